"""Blocks that only `async with` enters: any other use raises an error that says so."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Generic, NoReturn, TypeVar

_T_co = TypeVar("_T_co", covariant=True)


class AsyncBlock(Generic[_T_co]):
    """Passes `async with` on to `block`. The error for any other use names the call `what` and ends with `advice`."""

    def __init__(self, block: AbstractAsyncContextManager[_T_co], what: str, advice: str) -> None:
        self._block = block
        self._what = what
        self._advice = advice

    async def __aenter__(self) -> _T_co:
        return await self._block.__aenter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        await self._block.__aexit__(kind, error, trace)

    def __enter__(self) -> NoReturn:
        msg = f"{self._what} can't be entered with a plain `with`: {self._advice}"
        raise TypeError(msg)

    def __exit__(self, *error: object) -> None:
        """Never called; without it, Python refuses the plain `with` by itself, with another text."""

    def __getattr__(self, name: str) -> NoReturn:
        msg = f"{self._what} has no {name!r} before it is entered: {self._advice}"
        raise AttributeError(msg)
