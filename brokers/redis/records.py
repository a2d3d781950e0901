"""The scripts of the job store in a Redis, and what they read and write as bytes.

A record is a string: numbers in a head of fixed size, then what the last change said, how far its run is, the result, the body,
and who waits for the end. A script reads the numbers and passes the rest on. All keys begin with the key that a script is given:

    r:<id>           the record of a publish of this id, nearly always the only one
    t:<publish><id>  the record of another publish of this id, which came while the one above was there
    s:<id>           a sorted set of these other publishes
    order            a sorted set of <publish><id>, by the store's count
    counted, swept   the last count; how far the sweep has come

Records expire by themselves. Whoever adds records looks at twice as many entries of `order`, from the oldest on and then again from
the oldest, and deletes those whose record is gone. So at most every second entry is of such a record, and nothing scans.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import Final, Literal

import msgspec

from leveret.store import Abort, Change, Key, Progress, Record, State, Verdict

from ..records import storable
from .wire import Script

_CODES: Final[dict[State, int]] = {
    "queued": 1,
    "delayed": 2,
    "retrying": 3,
    "running": 4,
    "done": 5,
    "failed": 6,
    "aborted": 7,
    "expired": 8,
}
_STATES: Final[dict[int, State]] = {code: state for state, code in _CODES.items()}
VERDICTS: Final[dict[int, Verdict]] = {ord("g"): "go", ord("a"): "aborted", ord("e"): "ended"}
"""By what the script says of each run."""
ABORTS: Final[dict[bytes, Abort]] = {
    b"aborted": "aborted",
    b"asked": "asked",
    b"finished": "finished",
    b"unknown": "unknown",
}
"""By what the script says."""
_HEAD: Final = struct.Struct(">q7dBB4I")
"""publish, count, passes, attempt, created_ms, started_ms or -1, at_ms, keep_until_ms; state, asked; the sizes of four parts."""
_MOST_BYTES: Final = 4 << 20
"""The records of one answer take about so many bytes at most: they lie in the server's memory until the client has read them."""

_CHANGE: Final = struct.Struct(">q2dB2d4I").pack
"""publish, passes, attempt, state or 0 for progress, at_ms, milliseconds to keep; the sizes of id, told, result and body, which follow."""
_KEY: Final = struct.Struct(">qH").pack
"""publish, the size of the id, which follows."""
_packed: Final = msgspec.msgpack.Encoder().encode
_told: Final = msgspec.msgpack.Decoder(tuple[str, str, str, str, str])
_run: Final = msgspec.msgpack.Decoder(tuple[float, str])


def entries(changes: Sequence[Change | Progress]) -> bytes:
    """Return changes as `ENTER` takes them."""
    parts: list[bytes] = []
    for one in changes:
        job_id, result, body = one.job_id.encode(), b"", b""
        if isinstance(one, Change):
            told = _packed((one.queue, one.job, storable(one.content_type), storable(one.error), storable(one.reason)))
            if one.result is not None:
                result = b"=" + one.result
            if one.body is not None:
                body = b"=" + one.body
            state, at_ms, keep_ms = _CODES[one.state], one.at_ms, round(one.keep_s * 1000)
        else:
            told = _packed((float(one.fraction), storable(one.note)))
            state = at_ms = keep_ms = 0
        sizes = len(job_id), len(told), len(result), len(body)
        head = _CHANGE(one.publish, one.passes, one.attempt, state, at_ms, keep_ms, *sizes)
        parts += head, job_id, told, result, body
    return b"".join(parts)


def places_of(places: Iterable[int]) -> bytes:
    """Return the places of a tag's changes in a batch as `ENTER` takes them."""
    return b"".join(map(struct.Struct(">I").pack, places))


def publish_of(key: Key) -> bytes:
    """Return the publish of a key as the scripts take it."""
    return key.publish.to_bytes(8, "big", signed=True)


def publishes(keys: Iterable[Key]) -> bytes:
    """Return keys as the scripts take them."""
    parts: list[bytes] = []
    for key in keys:
        job_id = key.job_id.encode()
        parts += _KEY(key.publish, len(job_id)), job_id
    return b"".join(parts)


def numbers(text: bytes) -> Sequence[int]:
    """Return the publishes that a script or a notice names."""
    return [number for (number,) in struct.iter_unpack(">q", text)]


def record_of(job_id: str, text: bytes) -> tuple[float, Record] | None:
    """Return the store's count of a record, and the record, without result and body if the text ends before them; None if it can't be read."""
    try:
        return _record_of(job_id, text)
    except (msgspec.MsgspecError, struct.error, KeyError):
        return None


def _record_of(job_id: str, text: bytes) -> tuple[float, Record]:
    publish, count, passes, attempt, created, started, at, keep_until, state, asked, *sizes = _HEAD.unpack_from(text)
    parts: list[bytes] = []
    start = _HEAD.size
    for size in sizes:
        parts.append(text[start : start + size])
        start += size
    told, run, result, body = parts
    queue, job, content_type, error, reason = _told.decode(told)
    progress, note = _run.decode(run) if run else (None, "")
    return count, Record(
        job_id=job_id,
        publish=publish,
        queue=queue,
        job=job,
        state=_STATES[state],
        passes=int(passes),
        attempt=int(attempt),
        created_ms=int(created),
        started_ms=None if started < 0 else int(started),
        at_ms=int(at),
        keep_until_ms=int(keep_until),
        progress=progress,
        note=note,
        asked=asked == 1,
        content_type=content_type,
        error=error,
        reason=reason,
        result=result[1:] or (b"" if result else None),
        body=body[1:] or (b"" if body else None),
    )


def state_code(state: State | None) -> int:
    """Return the number of a state; 0 for None."""
    return 0 if state is None else _CODES[state]


def _script(flags: Literal["", "no-writes", "allow-oom"], *parts: str) -> Script:
    first = f"#!lua flags={flags}\n" if flags else "#!lua\n"
    return Script(first + "".join(parts))


_FIND: Final = f"""\
local P, HEAD, SIZE, MOST = KEYS[1], '>c8dddddddBBI4I4I4I4', {_HEAD.size}, {_MOST_BYTES}
local CHANGE, PUBLISH = '>c8ddBddI4I4I4I4', '>c8I2c0'
local call = redis.call

-- Return a record up to a byte; '' for what is none: a key of another type, or a text that is shorter.
local function peek(key, last)
  local text = redis.pcall('GETRANGE', key, 0, last)
  if type(text) == 'table' then
    if string.sub(text['err'], 1, 9) ~= 'WRONGTYPE' then error(text) end
    return ''
  end
  return #text < (last < 0 and SIZE or last + 1) and '' or text
end

-- Return the key of the record of a publish, and the record up to a byte; false if there is none, with the key for a new one.
local function find(id, publish, last)
  local key = P .. 'r:' .. id
  local first = peek(key, last)
  if string.sub(first, 1, 8) == publish then return key, first end
  local other = P .. 't:' .. publish .. id
  local text = peek(other, last)
  if text ~= '' then return other, text end
  return first == '' and key or other, false
end

local function stage_of(state) return state <= 3 and 0 or state == 4 and 1 or 2 end
"""

_TELL: Final = """\
local WAITER = 16
local ended = {}

-- Note that a publish ended for which these wait.
local function note_end(publish, waiters)
  for i = 1, #waiters, WAITER do
    local waiter = string.sub(waiters, i, i + WAITER - 1)
    ended[waiter] = (ended[waiter] or '') .. publish
  end
end

-- Tell each waiter which publishes ended. A user who may not do that is no reason to fail: waiters ask, too.
local function tell()
  for waiter, publishes in pairs(ended) do redis.pcall('SPUBLISH', P .. 'ends:' .. waiter, publishes) end
end

local function now_ms()
  local time = call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end
"""

_SWEEP: Final = """\
-- Look at the next entries of the order, and delete those whose record is gone. Return how many.
local function sweep(most)
  local page = call('ZRANGE', P .. 'order', call('GET', P .. 'swept') or '-inf', '+inf', 'BYSCORE', 'LIMIT', 0, most)
  if #page < most then
    call('DEL', P .. 'swept')
  else
    call('SET', P .. 'swept', '(' .. call('ZSCORE', P .. 'order', page[most]))
  end
  local gone = {}
  for _, entry in ipairs(page) do
    local publish, id = string.sub(entry, 1, 8), string.sub(entry, 9)
    local _, text = find(id, publish, 7)
    if not text then
      gone[#gone + 1] = entry
      call('ZREM', P .. 's:' .. id, publish)
    end
  end
  for i = 1, #gone, 1000 do call('ZREM', P .. 'order', unpack(gone, i, math.min(i + 999, #gone))) end
  return #gone
end
"""

ENTER: Final = _script(
    "",
    _FIND,
    _TELL,
    _SWEEP,
    """\
-- Enter changes and progress, in order. Begins: all are runs that begin; one that was asked to end becomes aborted instead.
-- Return a letter for each change: it goes (g), or the publish is aborted (a) or has ended (e).
-- A new record's count is `counted` and the place of its change; `places` are those of a batch of which other tags have the rest.
-- Then another server counts, and where a fail-over sets it back, the tag's own records come first.
local begins, batch, counted, places = ARGV[1] == '1', ARGV[2], ARGV[3], ARGV[4]
local base, now, verdicts, start, place, added = tonumber(counted or call('GET', P .. 'counted') or 0), now_ms(), {}, 1, 0, 0

-- Enter a change that counts, over `text` if there is a record.
local function enter(id, publish, key, text, passes, attempt, state, told, at, keep_ms, result, body)
  local number, created, started, asked, run, kept, waiters = nil, at, -1, 0, '', '', ''
  if text then
    local _, n, _, _, c, s, _, _, _, a, size1, size2, size3, size4 = struct.unpack(HEAD, text)
    local from = SIZE + size1
    number, created, started, asked = n, c, s, a
    run = string.sub(text, from + 1, from + size2)
    from = from + size2 + size3
    kept, waiters = string.sub(text, from + 1, from + size4), string.sub(text, from + size4 + 1)
  else
    number, added = base + (places and struct.unpack('>I4', places, 4 * place - 3) or place), added + 1
    if counted then
      local last = call('ZRANGE', P .. 'order', 0, 0, 'REV', 'WITHSCORES')[2]
      number = math.max(number, last and tonumber(last) + 1 or 0)
    end
    call('ZADD', P .. 'order', string.format('%.0f', number), publish .. id)
  end
  if state == 4 then
    started, run = at, ''
  elseif state > 4 then
    asked = 0
    note_end(publish, waiters)
    waiters = ''
  end
  local until_ms = now + keep_ms
  if body == '' then body = kept end
  local head = struct.pack(HEAD, publish, number, passes, attempt, created, started, at, until_ms, state, asked, #told, #run, #result, #body)
  local stays = string.format('%.0f', until_ms)
  call('SET', key, head .. told .. run .. result .. body .. waiters, 'PXAT', stays)
  if key ~= P .. 'r:' .. id then
    local others = P .. 's:' .. id
    call('ZADD', others, string.format('%.0f', number), publish)
    call('PEXPIREAT', others, stays, 'NX')
    call('PEXPIREAT', others, stays, 'GT')
  end
end

while start <= #batch do
  local publish, passes, attempt, state, at, keep_ms, size1, size2, size3, size4, first = struct.unpack(CHANGE, batch, start)
  local second, third, fourth = first + size1, first + size1 + size2, first + size1 + size2 + size3
  start, place = fourth + size4, place + 1
  local id, told = string.sub(batch, first, second - 1), string.sub(batch, second, third - 1)
  local key, text = find(id, publish, -1)
  local counts, verdict = true, 'g'
  if text then
    local _, _, known_passes, known_attempt, _, _, _, _, known_state, asked, size1, size2, size3, size4 = struct.unpack(HEAD, text)
    if state == 0 then
      counts = false
      if known_state == 4 and known_passes == passes and known_attempt == attempt then
        local rest = SIZE + size1
        call('SET', key, string.sub(text, 1, SIZE - 12) .. struct.pack('>I4I4I4', #told, size3, size4)
          .. string.sub(text, SIZE + 1, rest) .. told .. string.sub(text, rest + size2 + 1), 'KEEPTTL')
      end
    elseif begins and (known_passes > passes or known_passes == passes and known_state > 4) then
      counts, verdict = false, known_state == 7 and 'a' or 'e'
    elseif begins and asked == 1 then
      state, verdict = 7, 'a'
    elseif known_passes ~= passes then
      counts = passes > known_passes
    elseif known_attempt ~= attempt then
      counts = attempt > known_attempt
    else
      counts = stage_of(state) > stage_of(known_state)
    end
  else
    counts = state > 0
  end
  if counts then
    enter(id, publish, key, text, passes, attempt, state, told, at, keep_ms, string.sub(batch, third, fourth - 1), string.sub(batch, fourth, start - 1))
  end
  verdicts[place] = verdict
end
if added > 0 then
  if not counted then call('SET', P .. 'counted', string.format('%.0f', base + place)) end
  sweep(2 * added)
end
tell()
return table.concat(verdicts)
""",
)

COUNT: Final = _script("", "return redis.call('INCRBY', KEYS[1] .. 'counted', ARGV[1])\n")
"""Count the changes of a batch for several tags."""

_READ: Final = """\
-- Return the place after the last publish that was looked at, then place and record of each that has ended, or of each.
local keys, only_ended, waiter = ARGV[1], ARGV[2] == '1', ARGV[3]
local found, size, start, place = {0}, 0, 1, 0
while start <= #keys and size <= MOST do
  local publish, id, after = struct.unpack(PUBLISH, keys, start)
  local key, head = find(id, publish, SIZE - 1)
  if head then
    local _, _, _, _, _, _, _, _, state, _, size1, size2, size3, size4 = struct.unpack(HEAD, head)
    if state > 4 or not only_ended then
      local text = call('GET', key)
      found[#found + 1], found[#found + 2] = place, text
      size = size + #text
    elseif waiter ~= '' then
      wait(key, SIZE + size1 + size2 + size3 + size4, waiter)
    end
  end
  start, place = after, place + 1
end
found[1] = place
return found
"""

READ: Final = _script("no-writes", _FIND, "local function wait() end\n", _READ)
AWAIT: Final = _script(
    "allow-oom",
    _FIND,
    """\
-- Let a waiter hear of the end of a record, which has so many bytes before those of its waiters. It keeps the last eight of them.
local function wait(key, bytes, waiter)
  local waiters = call('GETRANGE', key, bytes, -1)
  for i = 1, #waiters, #waiter do
    if string.sub(waiters, i, i + #waiter - 1) == waiter then return end
  end
  if #waiters < 8 * #waiter then
    call('APPEND', key, waiter)
  else
    call('SETRANGE', key, bytes, string.sub(waiters, #waiter + 1) .. waiter)
  end
end
""",
    _READ,
)

ASKED: Final = _script(
    "no-writes",
    _FIND,
    """\
-- Return the places of those publishes that are asked to end.
local keys, found, start, place = ARGV[1], {}, 1, 0
while start <= #keys do
  local publish, id, after = struct.unpack(PUBLISH, keys, start)
  local _, head = find(id, publish, SIZE - 17)
  if head and string.byte(head, SIZE - 16) == 1 then found[#found + 1] = place end
  start, place = after, place + 1
end
return found
""",
)

ABORT: Final = _script(
    "allow-oom",
    _FIND,
    _TELL,
    """\
-- Abort a publish: one that waits ends, one that runs is marked.
local key, text = find(ARGV[1], ARGV[2], -1)
if not text then return 'unknown' end
local _, number, passes, attempt, created, started, _, until_ms, state, _, size1, size2, size3, size4 = struct.unpack(HEAD, text)
if state == 7 then return 'aborted' elseif state > 4 then return 'finished' end
if state == 4 then
  call('SETRANGE', key, SIZE - 17, string.char(1))
  return 'asked'
end
local last = SIZE + size1 + size2 + size3 + size4
call('SET', key, struct.pack(HEAD, ARGV[2], number, passes, attempt, created, started, now_ms(), until_ms, 7, 0,
  size1, size2, size3, size4) .. string.sub(text, SIZE + 1, last), 'KEEPTTL')
note_end(ARGV[2], string.sub(text, last + 1))
tell()
return 'aborted'
""",
)

OF_ID: Final = _script(
    "no-writes",
    _FIND,
    """\
-- Return the publishes of an id, the last first, at most so many.
local id, limit, found = ARGV[1], tonumber(ARGV[2]), {}
local first = peek(P .. 'r:' .. id, 15)
local publish, number = nil, -1
if first ~= '' then publish, number = struct.unpack('>c8d', first) end
local start, others = 0, nil
repeat
  others = call('ZRANGE', P .. 's:' .. id, start, start + 99, 'REV', 'WITHSCORES')
  start = start + 100
  for i = 1, #others, 2 do
    if publish and number > tonumber(others[i + 1]) then
      found[#found + 1] = publish
      publish = nil
    end
    if call('EXISTS', P .. 't:' .. others[i] .. id) == 1 then found[#found + 1] = others[i] end
  end
until #others < 200 or #found >= limit
found[#found + 1] = publish
return table.concat(found, '', 1, math.min(limit, #found))
""",
)

LIST: Final = _script(
    "no-writes",
    _FIND,
    """\
-- Look at some records, the last created first, from a count down; at most `limit` of them that are asked for. Return where to go on,
-- "" at the end, then id and record of each, without result and body.
local from, look, limit, prefix, of_state, of_queue, of_job = unpack(ARGV)
look, limit, of_state = tonumber(look), tonumber(limit), tonumber(of_state)
local page = call('ZRANGE', P .. 'order', from, '-inf', 'BYSCORE', 'REV', 'LIMIT', 0, look, 'WITHSCORES')
local found, size = {''}, 0
if #page == 2 * look then found[1] = '(' .. page[#page] end
for i = 1, #page, 2 do
  local publish, id = string.sub(page[i], 1, 8), string.sub(page[i], 9)
  if string.sub(id, 1, #prefix) == prefix then
    local key, head = find(id, publish, SIZE - 1)
    if head then
      local _, _, _, _, _, _, _, _, state, _, size1, size2 = struct.unpack(HEAD, head)
      if of_state == 0 or state == of_state then
        local text = call('GETRANGE', key, 0, SIZE + size1 + size2 - 1)
        local readable, told = pcall(cmsgpack.unpack, string.sub(text, SIZE + 1, SIZE + size1))
        if not readable or type(told) ~= 'table' then told = {} end
        if (of_queue == '' or told[1] == of_queue) and (of_job == '' or told[2] == of_job) then
          found[#found + 1], found[#found + 2] = id, text
          size = size + #text
          if #found > 2 * limit or size > MOST then
            found[1] = '(' .. page[i + 1]
            break
          end
        end
      end
    end
  end
end
return found
""",
)

DROP: Final = _script(
    "allow-oom",
    _FIND,
    """\
-- Delete the records of publishes, and return how many were there.
local keys, count, start = ARGV[1], 0, 1
while start <= #keys do
  local publish, id, after = struct.unpack(PUBLISH, keys, start)
  local key, text = find(id, publish, 7)
  if text then
    count = count + 1
    call('DEL', key)
    call('ZREM', P .. 's:' .. id, publish)
    call('ZREM', P .. 'order', publish .. id)
  end
  start = after
end
return count
""",
)

SWEEP: Final = _script("allow-oom", _FIND, _SWEEP, "return sweep(tonumber(ARGV[1]))\n")
