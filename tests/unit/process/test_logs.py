"""How leveret's own processes print their records: which tracebacks, and what a terminal gets."""

import io
import logging
import sys
from collections.abc import Callable, Generator

import pytest

from leveret.process.logs import STORM, STORM_S, Storms, set_up_logs

ID = "01a22a13-4990-7243-8d90-4e6c7b528255"


class Terminal(io.StringIO):
    """A standard error that is a terminal of an unknown width, which counts as 80 columns."""

    def __init__(self, *, terminal: bool) -> None:
        super().__init__()
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal


@pytest.fixture
def printing(monkeypatch: pytest.MonkeyPatch) -> Generator[Callable[..., Terminal], None, None]:
    """Set the logs of a process up, beside those of pytest; what is printed is returned."""
    root, asyncios = logging.getLogger(), logging.getLogger("asyncio")
    levels = root.level, asyncios.level
    ours: list[logging.Handler] = []

    def set_up(level: str = "info", number: int | None = None, *, terminal: bool = False) -> Terminal:
        stream = Terminal(terminal=terminal)
        monkeypatch.setattr(sys, "stderr", stream)
        others = [handler for handler in root.handlers if handler not in ours]
        root.handlers.clear()
        set_up_logs(level, number)
        ours[:] = root.handlers
        root.handlers.extend(others)
        return stream

    yield set_up
    for handler in ours:
        root.removeHandler(handler)
    root.level, asyncios.level = levels


def fail(text: str = "no way") -> LookupError:
    try:
        raise LookupError(text)
    except LookupError as error:
        return error


def failed(text: str = "no way", name: str = "leveret.attempt", level: int = logging.WARNING) -> None:
    logging.getLogger(name).log(level, "job greet %s attempt 1: retry: LookupError", ID, exc_info=fail(text))


def test_a_failed_run_is_printed_with_its_traceback(printing: Callable[..., Terminal]) -> None:
    """Who must first find and set a setting waits for the failure to come again."""
    out = printing()
    failed()
    line, *below = out.getvalue().splitlines()
    assert line.endswith(f"leveret.attempt job greet {ID} attempt 1: retry: LookupError")
    assert below[0] == "  Traceback (most recent call last):"
    assert below[-1] == "  LookupError: no way"


@pytest.mark.parametrize(
    ("name", "level", "shown"),
    [("leveret.consumer", logging.ERROR, "info"), ("leveret.consumer", logging.CRITICAL, "error")],
)
def test_other_tracebacks_are_for_debugging_or_for_bugs(
    printing: Callable[..., Terminal], name: str, level: int, shown: str
) -> None:
    """A queue that can't be reached is a line, whatever raised."""
    out = printing(shown)
    failed(name=name, level=level)
    assert ("Traceback" in out.getvalue()) is (level == logging.CRITICAL)
    out = printing("debug")
    failed(name=name, level=level)
    assert "\n  Traceback" in out.getvalue()


def test_the_text_of_an_error_neither_forges_a_line_nor_moves_the_cursor(printing: Callable[..., Terminal]) -> None:
    """What a foreign producer sent would erase the line above it, or write one that sends somebody astray."""
    out = printing()
    failed(
        "\x1b[2Ano\r\n2026-01-01 00:00:00,000 CRITICAL 1 leveret.worker forged\u2028as\x07 amqp://guest:hunter2@host"
    )
    text = out.getvalue()
    below = text.splitlines()[1:]
    assert all(line.startswith("  ") for line in below)
    assert not {char for char in text if not char.isprintable()} - {"\n"}
    assert "hunter2" not in text
    assert "  2026-01-01 00:00:00,000 CRITICAL 1 leveret.worker forged" in below


def test_an_error_that_cannot_be_shown_is_printed_all_the_same(printing: Callable[..., Terminal]) -> None:
    """The record would be lost, with a traceback of logging's own."""

    class Mute(LookupError):
        def __str__(self) -> str:
            raise ValueError

    out = printing()
    logging.getLogger("leveret.attempt").error("job greet", exc_info=(Mute, Mute(), None))
    assert out.getvalue().splitlines()[-1].endswith("Mute: <exception str() failed>")


def test_in_a_storm_a_traceback_is_printed_once_a_minute() -> None:
    """A database that is away for a night fills the disk, and hides every other failure."""
    storms, place = Storms(), (LookupError, "shop.py", 7)
    second = 1000.0
    first = [storms.left_out(place, second + n / 100) for n in range(STORM + 5)]
    assert first == [0] * (STORM - 1) + [None] * 6
    steady = [storms.left_out(place, second + n) for n in range(1, 200)]
    printed = [(n, left_out) for n, left_out in enumerate(steady, 1) if left_out is not None]
    assert [n for n, _ in printed] == [61, 121, 181]
    assert [left_out for _, left_out in printed] == [66, 59, 59]
    quiet = second + 200 + STORM_S
    assert storms.left_out(place, quiet) == 18
    assert [storms.left_out(place, quiet + n * 10) for n in range(1, 100)] == [0] * 99


def test_another_traceback_is_printed_in_a_storm_and_few_are_kept() -> None:
    """What is new would be taken for what is known; and lines without end would fill the memory."""
    storms = Storms()
    for n in range(10_000):
        storms.left_out((LookupError, "shop.py", 7), n / 1000)
        assert storms.left_out((LookupError, "shop.py", n + 8), n / 1000) == 0
    assert len(storms._alike) <= 200  # pyright: ignore[reportPrivateUsage]
    assert storms.left_out((LookupError, "shop.py", 7), 10.0) is None
    assert storms.left_out((KeyError, "shop.py", 7), 10.0) == 0


def test_a_record_without_its_traceback_says_so_and_keeps_it(
    printing: Callable[..., Terminal], caplog: pytest.LogCaptureFixture
) -> None:
    """Services that collect errors read `exc_info`; who reads the log looks for the traceback."""
    out = printing()
    logging.getLogger().addHandler(caplog.handler)
    for _ in range(STORM + 2):
        failed()
    text = out.getvalue()
    assert text.count("  Traceback") == STORM - 1
    assert text.splitlines()[-1].endswith("retry: LookupError (same traceback as above)")
    assert all(record.exc_info for record in caplog.records)


def test_a_terminal_gets_the_time_the_level_and_what_happened(
    printing: Callable[..., Terminal], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A date, a pid and a logger's name fill half of each line, and leave the rest for the next one."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    log = logging.getLogger("leveret.attempt")
    out = printing(terminal=True)
    log.info("job invoice.send %s attempt 1: done after 12.3 ms", ID)
    time_of_day, rest = out.getvalue()[:8], out.getvalue()[8:]
    assert time_of_day.replace(":", "").isdigit()
    assert rest == " \x1b[32mINFO\x1b[0m job invoice.send 01a22a13-4990-7243: done after 12.3 ms\n"

    log.info("job greet %s attempt 12: done after 1.0 ms", ID)
    assert out.getvalue().endswith("job greet 01a22a13-4990-7243 attempt 12: done after 1.0 ms\n")

    for name, value in (("NO_COLOR", "1"), ("TERM", "dumb")):
        monkeypatch.setenv(name, value)
        out = printing(terminal=True)
        log.info("job invoice.send %s attempt 1: done after 12.3 ms", ID)
        assert out.getvalue()[8:] == " INFO job invoice.send 01a22a13-4990-7243: done after 12.3 ms\n"
        monkeypatch.delenv(name)


def test_on_a_terminal_a_line_is_broken_between_words(
    printing: Callable[..., Terminal], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The terminal itself breaks in the middle of a URL or an id, which can then neither be read nor copied."""
    monkeypatch.setenv("NO_COLOR", "1")
    out = printing(number=1, terminal=True)
    url = "amqp://shop:secret@rabbit.example.org/shop"
    logging.getLogger("leveret.worker").info("worker 4711 of app shop takes jobs from emails (100 at once) on %s", url)
    assert [line[8:] for line in out.getvalue().splitlines()] == [
        " #1 INFO worker 4711 of app shop takes jobs from emails (100 at once) on",
        " amqp://shop:***@rabbit.example.org/shop",
    ]


def test_a_line_of_a_handler_names_its_job(printing: Callable[..., Terminal], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a hundred jobs that run at once, nobody knows which one `fetching` belongs to."""
    monkeypatch.setenv("NO_COLOR", "1")
    fields = {"job": "note", "job_id": ID, "queue": "notes", "attempt": 1}
    log = logging.LoggerAdapter(logging.getLogger("leveret.job"), fields)
    out = printing()
    log.info("one %s\n  two", 1)
    assert out.getvalue().endswith(f" leveret.job job note {ID} attempt 1: one 1\n  two\n")
    out = printing(terminal=True)
    log.info("one")
    fields["attempt"] = 2
    log.info("two %s", ID)
    first, second = out.getvalue().splitlines()
    assert first.endswith(" INFO job note 01a22a13-4990-7243: one")
    assert second.endswith(f" INFO job note 01a22a13-4990-7243 attempt 2: two {ID}")


def test_records_of_a_users_loggers_are_printed_as_they_are(
    printing: Callable[..., Terminal], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table or a list that a handler logs would be one long line."""
    monkeypatch.setenv("NO_COLOR", "1")
    for terminal in (False, True):
        out = printing(terminal=terminal)
        logging.getLogger("leveret.job").info("one\n  two %s", ID)
        logging.getLogger("shop").error("three", exc_info=fail())
        assert f"one\n  two {ID}\n" in out.getvalue()
        assert "three\nTraceback" in out.getvalue()
