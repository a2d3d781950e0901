"""The job store in a Redis or Valkey: one script for each call, on one connection for each server.

On a cluster the records lie under 16 tags, by the id of the job; a call for several jobs is a script for each tag.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final, TypeAlias, TypeVar, final
from zlib import crc32

from leveret.errors import ConfigurationError, LeveretError, StoreUnavailable
from leveret.runtime import Runtime
from leveret.store import Abort, Change, Key, Progress, Record, State, Verdict

from ..records import Watched, in_order
from . import records
from .address import Address
from .link import Link, meaning_of
from .wire import Part, Refused, Script, Wire, packed_words

log = logging.getLogger("leveret.redis")

_Of = TypeVar("_Of", Change, Change | Progress, Key)

_Call: TypeAlias = tuple[str, Script, Sequence[Part]]
"""A tag, a script and its arguments."""

_TAGS: Final = 16
_AT_ONCE: Final = 1000
"""How many records a script looks at, at most: a server answers nothing else meanwhile, for some milliseconds."""
_AGAIN_S: Final = 0.1
"""The wait before a server that executed nothing is asked again, seconds."""
_OF_RIGHTS: Final = ("The user executing", "ACL failure")
"""What Redis 7.0 and its successors say of a script whose user may not run one of its commands."""
_SWEEPS: Final = 100
"""How often a `trim` that finds much looks further."""


@final
class RedisJobs:
    """A `leveret.store.Store` on the server or the cluster at `address`. Every call ends within the setting `connect_timeout_s`."""

    def __init__(self, address: Address, runtime: Runtime) -> None:
        self.what = str(address)
        """As `Store.what`."""
        tags = _TAGS if address.kind == "cluster" else 1
        self._tags = [f"{address.prefix}:{{jobs:{number}}}:" for number in range(tags)]
        """What all keys of some records begin with. The name of a queue has no colon, so none of its keys begins like that."""
        self._link = Link(address, runtime, name=f"leveret {runtime.app} store")
        self._limit_s = runtime.settings.connect_timeout_s
        self._one = asyncio.Lock()
        """Held during a call: its waiters get it in the order in which they came."""
        self._tell: Callable[[Sequence[Key]], None] | None = None
        self._watched = Watched()
        self._waiter = secrets.token_hex(8)
        """What the records that we wait for have of us; as long as WAITER in the scripts."""
        self._hears: dict[str, Wire] = {}
        """By tag: the connection on which we hear of ends."""
        self._deaf = False
        """Whether we may not hear of them."""
        self._closed = False

    async def write(self, changes: Sequence[Change | Progress], /) -> None:
        """As `Store.write`; on a cluster, each tag's changes have their effect together."""
        await self._enter(0, changes)

    async def begin(self, changes: Sequence[Change], /) -> Sequence[Verdict]:
        """As `Store.begin`."""
        letters = await self._enter(1, changes)
        return [records.VERDICTS[letters[place]] for place in range(len(changes))]

    async def _enter(self, begins: int, changes: Sequence[Change | Progress]) -> dict[int, int]:
        """Enter changes; return by their places what the script says of each."""
        groups = self._by_tag(changes)
        async with self._turn() as why:
            counts: Sequence[Sequence[Part]] = [()] * len(groups)
            if groups and len(self._tags) > 1:  # the order in which all were heard of is one for all tags
                last = await self._evaluate(why, self._tags[0], records.COUNT, (len(changes),))
                counts = [(last - len(changes), records.places_of(places)) for _, places, _ in groups]
            calls = [
                (tag, records.ENTER, (begins, records.entries(own), *count))
                for (tag, _, own), count in zip(groups, counts, strict=True)
            ]
            answers = await self._evaluate_each(why, calls)
        letters: dict[int, int] = {}
        for (_, places, _), answer in zip(groups, answers, strict=True):
            letters.update(zip(places, answer, strict=True))
        return letters

    async def read(self, keys: Sequence[Key], /) -> Sequence[Record | None]:
        """As `Store.read`."""
        return in_order(keys, await self._read(records.READ, keys, 0, ""))

    async def ended(self, keys: Sequence[Key], /) -> Sequence[Record]:
        """As `Store.ended`."""
        if self._tell is None:
            return await self._read(records.READ, keys, 1, "")
        self._watched.add(keys)  # before the records say that we wait: a notice may come before the answer
        found = await self._read(records.AWAIT, keys, 1, self._waiter)
        self._watched.take(record.publish for record in found)
        return found

    async def _read(self, script: Script, keys: Sequence[Key], only_ended: int, waiter: str) -> Sequence[Record]:
        found = list[Record]()
        for tag, part in self._parts(keys):
            start = 0
            while left := part[start:]:
                answer = await self._call(tag, script, records.publishes(left), only_ended, waiter)
                seen: int = answer[0]
                places: Sequence[int] = answer[1::2]
                texts: Sequence[bytes] = answer[2::2]
                found += [record for _, record in _readable((left[place].job_id for place in places), texts)]
                start += seen
        return found

    def watch(self, ended: Callable[[Sequence[Key]], None], /) -> None:
        """As `Store.watch`; it listens from the next call of `ended` on."""
        self._tell = ended

    async def newest(self, job_ids: Sequence[str], /) -> Sequence[Key | None]:
        """As `Store.newest`."""
        return [next(iter(found), None) for found in await self._of_ids(job_ids, 1)]

    async def _of_ids(self, job_ids: Sequence[str], limit: int) -> Sequence[Sequence[Key]]:
        """Return the publishes of each id, the last first, at most so many."""
        calls: list[_Call] = [(self._tag(job_id), records.OF_ID, (_text(job_id), limit)) for job_id in job_ids]
        found = zip(job_ids, await self._each(calls), strict=True)
        return [[Key(job_id, number) for number in records.numbers(answer)] for job_id, answer in found]

    async def abort(self, key: Key, /) -> Abort:
        """As `Store.abort`."""
        answer = await self._call(self._tag(key.job_id), records.ABORT, key.job_id, records.publish_of(key))
        return records.ABORTS[answer]

    async def asked(self, keys: Sequence[Key], /) -> Sequence[Key]:
        """As `Store.asked`."""
        parts = self._parts(keys)
        answers = await self._each([(tag, records.ASKED, (records.publishes(part),)) for tag, part in parts])
        found = list[Key]()
        for (_, part), places in zip(parts, answers, strict=True):
            found += [part[place] for place in places]
        return found

    async def list(
        self, *, state: State | None = None, queue: str | None = None, job: str | None = None, limit: int
    ) -> Sequence[Record]:
        """As `Store.list`."""
        return await self._list(limit, "", state, queue, job)

    async def find(self, job_id: str, /, *, prefix: bool = False, limit: int = 100) -> Sequence[Record]:
        """As `Store.find`; by the beginning of an id it looks at all records."""
        if prefix:
            keys: Sequence[Key] = [record.key for record in await self._list(limit, job_id)]
        else:
            [keys] = await self._of_ids([job_id], limit)
        return [record for record in await self.read(keys) if record is not None]

    async def _list(
        self, limit: int, prefix: str, state: State | None = None, queue: str | None = None, job: str | None = None
    ) -> Sequence[Record]:
        wanted = _text(prefix), records.state_code(state), _text(queue or ""), _text(job or "")
        look = _AT_ONCE if any(wanted) else min(limit, _AT_ONCE)
        found = list[tuple[float, Record]]()
        for tag in self._tags:
            start, own = b"+inf", list[tuple[float, Record]]()
            while start and len(own) < limit:
                answer = await self._call(tag, records.LIST, start, look, limit - len(own), *wanted)
                start, ids, texts = answer[0], answer[1::2], answer[2::2]
                own += _readable((job_id.decode(errors="replace") for job_id in ids), texts)
            found += own
        found.sort(key=_count, reverse=True)
        return [record for _, record in found[:limit]]

    async def drop(self, keys: Sequence[Key], /) -> int:
        """As `Store.drop`."""
        parts = self._parts(keys)
        return sum(await self._each([(tag, records.DROP, (records.publishes(part),)) for tag, part in parts]))

    async def trim(self, at_most: int, /) -> int:
        """As `Store.trim`: records expire by themselves; this deletes what points to them."""
        look = min(at_most, _AT_ONCE)
        for tag in self._tags:
            for _ in range(_SWEEPS):
                if await self._call(tag, records.SWEEP, look) <= look // 2:
                    break
        return 0

    async def close(self) -> None:
        """As `Store.close`."""
        self._tell, self._closed = None, True
        self._link.close()

    def _tag(self, job_id: str) -> str:
        return self._tags[crc32(_text(job_id)) % len(self._tags)]

    def _by_tag(self, items: Sequence[_Of]) -> Sequence[tuple[str, Sequence[int], Sequence[_Of]]]:
        """Return the items of each tag, and their places; no tag without items."""
        if not items:
            return []
        if len(self._tags) == 1:
            return [(self._tags[0], range(len(items)), items)]
        groups: dict[str, tuple[list[int], list[_Of]]] = {}
        for place, item in enumerate(items):
            places, own = groups.setdefault(self._tag(item.job_id), ([], []))
            places.append(place)
            own.append(item)
        return [(tag, places, own) for tag, (places, own) in groups.items()]

    def _parts(self, keys: Sequence[Key]) -> Sequence[tuple[str, Sequence[Key]]]:
        """Return the keys of each tag, at most so many together as a script looks at."""
        groups = self._by_tag(keys)
        return [(tag, own[at : at + _AT_ONCE]) for tag, _, own in groups for at in range(0, len(own), _AT_ONCE)]

    async def _call(self, tag: str, script: Script, *arguments: Part) -> Any:
        [answer] = await self._each([(tag, script, arguments)])
        return answer

    async def _each(self, calls: Sequence[_Call]) -> Sequence[Any]:
        """Return the answers of scripts, each with a tag and its arguments."""
        async with self._turn() as why:
            return await self._evaluate_each(why, calls)

    @asynccontextmanager
    async def _turn(self) -> AsyncGenerator[deque[str]]:
        """Wait for the calls before this one; StoreUnavailable if it takes too long, for what lies in the yielded `why`."""
        if self._closed:
            msg = f"the job store {self.what} is closed"
            raise StoreUnavailable(msg)
        why: deque[str] = deque(maxlen=1)
        try:
            async with asyncio.timeout(self._limit_s), self._one:
                yield why
        except TimeoutError as error:
            said = f": {why[0]}" if why else ""
            msg = f"the job store {self.what} didn't answer within {self._limit_s:g} s{said}"
            raise StoreUnavailable(msg) from error

    async def _evaluate_each(self, why: deque[str], calls: Sequence[_Call]) -> Sequence[Any]:
        if len(calls) == 1:
            return [await self._evaluate(why, *calls[0])]
        answers = await asyncio.gather(*(self._evaluate(why, *call) for call in calls), return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return answers

    async def _evaluate(self, why: deque[str], tag: str, script: Script, arguments: Sequence[Part]) -> Any:
        """Return the answer of a script. A server that executed nothing is asked again, and `why` gets what it said."""
        words = packed_words((1, tag, *arguments))
        while True:
            wire = None
            try:
                wire = self._link.known(tag) or await self._link.wire(tag)
                if script is records.AWAIT and self._hears.get(tag) is not wire and not self._deaf:
                    await self._listen(tag, wire)
                return await wire.evaluate(script, words, 2 + len(arguments))
            except asyncio.CancelledError:
                # a server that is gone never answers on this connection
                self._link.failed(wire, TimeoutError())
                raise
            except Exception as error:
                self._link.failed(wire, error)
                if (refusal := self._refusal(error)) is not None:
                    raise refusal from error
                why.append(str(error))
            await asyncio.sleep(_AGAIN_S)

    def _refusal(self, error: Exception) -> Exception | None:
        """Return what to raise for an error; None if another try may help."""
        meaning = meaning_of(error)
        if meaning in {"moved", "busy"}:
            return None
        if meaning is None or _is_fault(error):
            return error  # the next call may do
        said = " ".join(str(error).split()) or type(error).__name__
        msg = f"the job store {said if isinstance(error, LeveretError) else f'{self.what}: {said}'}"
        return ConfigurationError(msg) if meaning == "wrong" else StoreUnavailable(msg)

    async def _listen(self, tag: str, wire: Wire) -> None:
        try:
            await wire.subscribe(f"{tag}ends:{self._waiter}".encode(), self._noticed)
        except Refused as error:
            if error.code != "NOPERM":
                raise
            self._deaf = True
            log.info("%s tells nobody of ends (%s): each is found by asking, up to a second late", self.what, error)
        else:
            self._hears[tag] = wire

    def _noticed(self, numbers: bytes) -> None:
        """Hear which publishes ended; nothing if the connection did, or the tag's records are elsewhere now."""
        if not numbers:
            self._hears.clear()
        elif self._tell is not None and (ended := self._watched.take(records.numbers(numbers))):
            self._tell(ended)


def _is_fault(error: Exception) -> bool:
    """Whether an error is of a script itself, not of what its user may do."""
    said = str(error)
    of_script = isinstance(error, Refused) and error.code in {"ERR", "WRONGTYPE"} and "user_script" in said
    return of_script and not any(words in said for words in _OF_RIGHTS)


def _readable(job_ids: Iterable[str], texts: Iterable[bytes]) -> list[tuple[float, Record]]:
    """Return records with their counts. One that can't be read isn't there: it mustn't hide the others."""
    found = map(records.record_of, job_ids, texts)
    return [one for one in found if one is not None]


def _text(text: str) -> bytes:
    return text.encode(errors="replace")


def _count(found: tuple[float, Record]) -> float:
    return found[0]
