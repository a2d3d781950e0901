"""Publishing inside a user's own transaction, on the connection of the user's own library.

The library is told by the module of the connection's class, and none is imported. All get the same statements: a savepoint, a time-out,
the jobs, and the release of the savepoint. The server ends a statement that takes too long: a cancelled task would end the whole
transaction with some libraries.
"""

from .once import Once
from .publish import Within, jobs_within
from .rows import Jobs, rows_of

__all__ = ["Jobs", "Once", "Within", "jobs_within", "rows_of"]
