"""What the errors of a connection mean for a turn."""

from __future__ import annotations

import asyncpg
import pytest

from leveret.brokers.postgresql.link import LEASE_LOST, meaning_of, reported
from leveret.errors import BrokerUnavailable, ConfigurationError


def of_server(sqlstate: str, message: str = "no") -> Exception:
    """Return the error that asyncpg makes of a server's message."""
    error: Exception = asyncpg.PostgresError.new({"S": "ERROR", "C": sqlstate, "M": message})
    return error


@pytest.mark.parametrize(
    ("error", "meaning"),
    [
        (of_server("08006"), "lost"),
        (of_server("57P01"), "lost"),
        (of_server("57P03"), "lost"),
        (of_server("25006"), "lost"),
        (of_server("25P03"), "lost"),
        (of_server("26000"), "lost"),
        (of_server("53300"), "lost"),
        (ConnectionResetError("reset"), "lost"),
        (TimeoutError(), "lost"),
        (asyncpg.InterfaceError("connection is closed"), "lost"),
        (BrokerUnavailable("no server"), "lost"),
        (of_server("55P03"), "busy"),
        (of_server("40P01"), "busy"),
        (of_server("40001"), "busy"),
        (of_server("57014"), "busy"),
        (of_server(LEASE_LOST), "lease"),
        (of_server("53100"), "full"),
        (of_server("58030"), "full"),
        (of_server("22021"), "refused"),
        (of_server("23514"), "refused"),
        (of_server("54000"), "refused"),
        (UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed"), "refused"),
        (asyncpg.DataError("invalid input for query argument $1"), "refused"),
        (of_server("42501"), "wrong"),
        (of_server("42P01"), "wrong"),
        (of_server("42883"), "wrong"),
        (ConfigurationError("another schema"), "wrong"),
        (KeyError("a bug"), None),
    ],
    ids=lambda value: getattr(value, "sqlstate", None) or str(value) or type(value).__name__,
)
def test_each_error_has_one_meaning(error: Exception, meaning: str | None) -> None:
    """A lock that is taken for a lost connection ends it; a lost one that is taken for a bad value fails jobs that are good."""
    assert meaning_of(error) == meaning


def test_only_what_the_server_reports_tells_that_nothing_was_committed() -> None:
    """A publish whose answer is lost may be there: done again without a word, the job would be there twice."""
    lost = asyncpg.ConnectionDoesNotExistError("connection was closed in the middle of operation")
    ended = asyncpg.ConnectionDoesNotExistError("connection was closed in the middle of operation: terminating")
    ended.__cause__ = of_server("57P01")

    unsent = asyncpg.InternalClientError("cannot switch to state 12; another operation (2) is in progress")

    assert [reported(error) for error in (of_server("55P03"), ended, unsent)] == [True, True, True]
    unknown = (
        lost,
        of_server("08P01"),
        TimeoutError(),
        ConnectionResetError("reset"),
        asyncpg.InterfaceError("closed"),
        asyncpg.InternalClientError("cannot switch to state 12; another operation (1) is in progress"),
    )
    assert not any(reported(error) for error in unknown)
