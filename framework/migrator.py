"""What creates and upgrades the tables of a broker in a database: the contract behind `leveret migrate`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol


class Migrator(Protocol):
    """The migrations of one schema of one database. Each method connects for itself.

    Each raises ConfigurationError for a wrong login, database, right or schema, and BrokerUnavailable if no server answers.
    """

    @property
    def what(self) -> str:
        """The database and the schema in it, without the password."""
        ...

    async def pending(self) -> Sequence[str]:
        """Return the names of the migrations that the database lacks, in order."""
        ...

    async def migrate(self, say: Callable[[str], None]) -> None:
        """Apply what is pending. Call `say` with one line for each migration, and for each thing that is waited for."""
        ...

    def sql(self, names: Sequence[str] | None) -> str:
        """Return the SQL of these pending migrations, or of all with None, without connecting."""
        ...
