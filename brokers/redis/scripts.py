"""The scripts, in Lua. Redis runs each alone and without a rollback: it first checks all that may fail, then writes.

Each is called with the keys of `Keys.common` first. A script that isn't flagged `allow-oom` is refused before it begins if the memory
of the server is full; so only turns that add a job that nobody held before go without the flag.
"""

from __future__ import annotations

from typing import Final

from .wire import Script

# Lua 5.1. `unpack` takes some 7 000 values, so lists are passed in pieces. An entry begins with the bytes 158 and 207, then 8 bytes of its number,
# its deliveries, its crashes, and its level, to which 64 is added if the job began. An answer ends with the entry that makes it larger than
# BYTES: what a slow link can't take before the client gives it up would be asked for again for ever.
_COMMON: Final = r"""
local SEQ, WORKERS, IDLE, DELAYED, DEAD, NEWS = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]
local LEVELS, NORMAL, BEGUN, MOST, TERM, BYTES = 6, 3, 64, 127, 4294967296, 4194304
local call, sub, byte, char, concat = redis.call, string.sub, string.byte, string.char, table.concat

local function in_pieces(list, f)
  for i = 1, #list, 1000 do f(unpack(list, i, math.min(i + 999, #list))) end
end

local function numbered(number, tail) return '\158\207' .. struct.pack('>I8', number) .. tail end

local function is_entry(entry) return #entry > 13 and sub(entry, 1, 2) == '\158\207' end

local function number_of(entry) return (struct.unpack('>I8', entry, 3)) end

-- A foreign entry may have any level.
local function list_of(level) return KEYS[LEVELS + (level >= 1 and level <= 4 and level or NORMAL)] end

local function now_ms()
  local time = call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

-- Give numbers to so many jobs; return the last before them. A counter that was deleted goes on with numbers that no job has.
local function count_up(count)
  local last = call('INCRBY', SEQ, count)
  if last == count then last = call('INCRBY', SEQ, now_ms() * 1000) end
  return last - count
end

local function append(level, tails)
  if #tails == 0 then return end
  local number, entries = count_up(#tails), {}
  for i = 1, #tails do entries[i] = numbered(number + i, tails[i]) end
  in_pieces(entries, function(...) call('RPUSH', list_of(level), ...) end)
end

-- Put entries back to their places. Only jobs that were put back before have lower numbers than theirs.
local function put_back(level, entries)
  if #entries == 0 then return end
  local key, numbers, by_number = list_of(level), {}, {}
  local function add(entry)
    local number = number_of(entry)
    numbers[#numbers + 1] = number
    by_number[number] = entry
  end
  for i = 1, #entries do add(entries[i]) end
  local highest = 0
  for i = 1, #numbers do highest = math.max(highest, numbers[i]) end
  for _ = 1, 5000 do
    local head = call('LINDEX', key, 0)
    if not head or not is_entry(head) or number_of(head) > highest then break end
    add(call('LPOP', key))
  end
  table.sort(numbers, function(a, b) return a > b end)
  for i = 1, #numbers do numbers[i] = by_number[numbers[i]] end
  in_pieces(numbers, function(...) call('LPUSH', key, ...) end)
end

-- Put jobs that a worker may have run back to their places, as redelivered.
local function deliver_again(entries, died)
  local by_level = {}
  for i = 1, #entries do
    local entry = entries[i]
    local deliveries, crashes, level = byte(entry, 11, 13)
    local begun = level >= BEGUN
    if begun then level = level - BEGUN end
    if died and (begun or crashes == 0) and crashes < MOST then crashes = crashes + 1 end
    if deliveries < MOST then deliveries = deliveries + 1 end
    by_level[level] = by_level[level] or {}
    table.insert(by_level[level], sub(entry, 1, 10) .. char(deliveries, crashes, level) .. sub(entry, 14))
  end
  for level, found in pairs(by_level) do put_back(level, found) end
end

local function release(held, died)
  local entries = call('HVALS', held)
  call('DEL', held)
  deliver_again(entries, died)
  return #entries > 0
end

local function release_letters(read)
  local all = call('HGETALL', read)
  for i = 2, #all, 2 do call('ZADD', DEAD, number_of(all[i]), all[i]) end
  call('DEL', read)
end

-- Make an entry of what a foreign producer pushed.
local function adopt(entry, level)
  local number = count_up(1) + 1
  local head = char(1, 0, level)
  if byte(entry) == 154 then return numbered(number, head .. sub(entry, 2)) end
  local id = string.format('foreign-%.0f', number)
  local body = '\198' .. struct.pack('>I4', #entry) .. entry
  return numbered(number, head .. char(160 + #id) .. id .. '\160\176application/json\192' .. body .. '\0\192\192\192\192')
end

-- Return the term of a lease; false without the lease.
local function term_of(id)
  local beat = call('HGET', WORKERS, id)
  return beat and math.floor(beat / TERM)
end

-- Move jobs that are due to the ends of their levels; return whether there were any. What a foreign producer added is adopted there.
local function move_due(most)
  local due = call('ZRANGEBYSCORE', DELAYED, '-inf', now_ms(), 'LIMIT', 0, most)
  if #due == 0 then return false end
  in_pieces(due, function(...) call('ZREM', DELAYED, ...) end)
  local by_level = {}
  for i = 1, #due do
    if is_entry(due[i]) then
      local tail = sub(due[i], 11)
      local level = byte(tail, 3)
      by_level[level] = by_level[level] or {}
      table.insert(by_level[level], tail)
    else
      call('RPUSH', list_of(NORMAL), due[i])
    end
  end
  for level, tails in pairs(by_level) do append(level, tails) end
  return true
end

local function waits()
  for key = LEVELS + 1, LEVELS + 4 do
    if call('EXISTS', KEYS[key]) == 1 then return true end
  end
  return false
end

-- Tell those who wait, once: each says again that it waits.
local function tell()
  if call('DEL', IDLE) == 1 then redis.pcall('SPUBLISH', NEWS, '') end
end
"""

# ARGV[1]: {beat?, takers, how many jobs of each level, delays, how many letters, claim?, wait?, term} in MessagePack, of which Redis reads no
# binary strings. So those jobs, delayed jobs and letters follow as arguments. KEYS[10 + i] is what the i-th taker holds.
# A turn may arrive minutes after its sender gave its connection up. Then the leases have a later term, and nothing is done.
# A taker: {id, settled, given back, begun, wanted, close?, reader?}. Returns {lost ids}, or {{}, beats, claimed, due in ms, begun}.
_TURN: Final = r"""
local left = BYTES

-- Take entries out of a level's list, as many as the answer has room for; return them.
local function take_out(level, most)
  local key, entries, largest = list_of(level), {}, BYTES
  while #entries < most and left > 0 do
    local popped = call('LPOP', key, math.min(most - #entries, math.ceil(left / largest)))
    if not popped then break end
    if #entries == 0 then largest = 1 end
    for i = 1, #popped do
      if left <= 0 then
        for j = #popped, i, -1 do call('LPUSH', key, popped[j]) end
        break
      end
      local size = #popped[i]
      entries[#entries + 1] = popped[i]
      left = left - size
      if size > largest then largest = size end
    end
  end
  return entries
end

local function claim(held, level, most)
  local entries, fields = take_out(level, most), {}
  for i = 1, #entries do
    if not is_entry(entries[i]) then entries[i] = adopt(entries[i], level) end
    fields[2 * i - 1] = sub(entries[i], 3, 10)
    fields[2 * i] = entries[i]
  end
  in_pieces(fields, function(...) call('HSET', held, ...) end)
  return entries
end

-- Numbers become fields, in place.
local function fields_of(numbers)
  for i = 1, #numbers do numbers[i] = struct.pack('>I8', numbers[i]) end
  return numbers
end

local function give_back(held, seqs)
  local by_level = {}
  in_pieces(seqs, function(...)
    local entries = call('HMGET', held, ...)
    call('HDEL', held, ...)
    for i = 1, #entries do
      if entries[i] then
        local level = byte(entries[i], 13) % BEGUN
        by_level[level] = by_level[level] or {}
        table.insert(by_level[level], entries[i])
      end
    end
  end)
  for level, entries in pairs(by_level) do put_back(level, entries) end
end

local function begin(held, seq)
  local entry = call('HGET', held, seq)
  if not entry then return 0 end
  local level = byte(entry, 13)
  if level < BEGUN then call('HSET', held, seq, sub(entry, 1, 12) .. char(level + BEGUN) .. sub(entry, 14)) end
  return 1
end

local work = cmsgpack.unpack(ARGV[1])
local takers, lost = work[2], {}
for i = 1, #takers do
  if term_of(takers[i][1]) ~= work[8] then lost[#lost + 1] = takers[i][1] end
end
if #lost > 0 then return {lost} end

local beats, claimed, begun, due_ms, freed = {}, {}, {}, false, false
if work[1] then
  for i = 1, #takers do call('HINCRBY', WORKERS, takers[i][1], 1) end
  beats = call('HGETALL', WORKERS)
end
for i = 1, #takers do
  local taker, held = takers[i], KEYS[LEVELS + 4 + i]
  in_pieces(fields_of(taker[2]), function(...) call('HDEL', held, ...) end)
  if #taker[3] > 0 then
    give_back(held, fields_of(taker[3]))
    freed = true
  end
  for _, field in ipairs(fields_of(taker[4])) do begun[#begun + 1] = begin(held, field) end
end
local place = 1
local function take(count)
  local taken = {}
  for i = 1, count do taken[i] = ARGV[place + i] end
  place = place + count
  return taken
end
for level = 1, 4 do
  local count = work[3][level]
  append(level, take(count))
  freed = freed or count > 0
end
local delays, letters = work[4], work[5]
if #delays > 0 then
  local number, now, later = count_up(#delays), now_ms(), take(#delays)
  for i = 1, #later do call('ZADD', DELAYED, now + delays[i], numbered(number + i, later[i])) end
end
if letters > 0 then
  local number, tails = count_up(letters), take(letters)
  for i = 1, letters do call('ZADD', DEAD, number + i, numbered(number + i, tails[i])) end
end
for i = 1, #takers do
  local taker, held = takers[i], KEYS[LEVELS + 4 + i]
  if taker[6] then
    if taker[7] then release_letters(held) else freed = release(held, false) or freed end
    call('HDEL', WORKERS, taker[1])
  end
end
local found, asked = false, false
if work[6] then
  freed = move_due(1000) or freed
  for i = 1, #takers do
    local wanted = takers[i][5]
    for j = 1, #wanted do
      local entries = claim(KEYS[LEVELS + 4 + i], wanted[j][1], wanted[j][2])
      claimed[#claimed + 1] = entries
      found, asked = found or #entries > 0, true
    end
  end
  local next_due = call('ZRANGE', DELAYED, 0, 0, 'WITHSCORES')
  if next_due[2] then due_ms = math.max(0, next_due[2] - now_ms()) end
end
if #delays > 0 or (freed and (not asked or waits())) then tell() end
if work[7] and asked and not found then call('SET', IDLE, 1) end
return {lost, beats, claimed, due_ms, begun}
"""

# ARGV: the new worker's id, and the term of its lease.
_REGISTER: Final = "call('HSET', WORKERS, ARGV[1], string.format('%.0f', ARGV[2] * TERM))"

# KEYS[11], KEYS[12]: what the worker holds, and what it reads. ARGV: its id, and whether it died. Its lease may be gone: somebody may
# have deleted `workers` alone.
_RELEASE: Final = r"""
call('HDEL', WORKERS, ARGV[1])
local freed = release(KEYS[11], ARGV[2] == '1')
release_letters(KEYS[12])
if freed then tell() end
"""

# KEYS[11]: what the worker holds. ARGV: its id, and the new term of its lease: turns of an earlier one that are still under way do nothing.
# Returns the numbers of the jobs, or false if the lease is gone.
_HELD: Final = r"""
local term, new = term_of(ARGV[1]), tonumber(ARGV[2])
if not term or term > new then return false end
if term < new then call('HSET', WORKERS, ARGV[1], string.format('%.0f', new * TERM)) end
return call('HKEYS', KEYS[11])
"""

# KEYS[11]: what the worker holds. ARGV: numbers of jobs that it doesn't know.
_RETURN: Final = r"""
local entries = {}
for i = 1, #ARGV do
  local entry = call('HGET', KEYS[11], ARGV[i])
  if entry then entries[#entries + 1] = entry end
  call('HDEL', KEYS[11], ARGV[i])
end
deliver_again(entries, false)
tell()
return #entries
"""

# KEYS[11]: what the reader holds. ARGV: its id, the last number that it has read, the highest that it may read, and how many.
_READ: Final = r"""
if call('HEXISTS', WORKERS, ARGV[1]) == 0 then return false end
local letters, size = {}, 0
while #letters < tonumber(ARGV[4]) and size < BYTES do
  local letter = call('ZRANGEBYSCORE', DEAD, '(' .. ARGV[2], ARGV[3], 'LIMIT', 0, 1)[1]
  if not letter then break end
  call('ZREM', DEAD, letter)
  if not is_entry(letter) then letter = adopt(letter, NORMAL) end
  call('HSET', KEYS[11], sub(letter, 3, 10), letter)
  letters[#letters + 1], size = letter, size + #letter
end
return letters
"""

# KEYS[11]: what the reader holds. ARGV: its id, the letter's number; for a replay the job's level and the job.
_TAKE: Final = r"""
if call('HEXISTS', WORKERS, ARGV[1]) == 0 or call('HDEL', KEYS[11], ARGV[2]) == 0 then return 0 end
if ARGV[4] then
  append(tonumber(ARGV[3]), {ARGV[4]})
  tell()
end
return 1
"""

# Returns how many jobs were deleted, and whether more may have been due.
_PURGE: Final = r"""
local more, count = move_due(5000), 0
for level = 1, 4 do
  count = count + call('LLEN', KEYS[LEVELS + level])
  call('UNLINK', KEYS[LEVELS + level])
end
return {count, more and 1 or 0}
"""

# KEYS from 11 on: what workers hold, then as many of what they read. Returns counts: the levels, held, delayed, dead, and whether the queue is known.
_DEPTH: Final = r"""
for _ = 1, 10 do
  if not move_due(1000) then break end
end
local counts, workers, held, read = {}, (#KEYS - 10) / 2, 0, 0
for level = 1, 4 do counts[level] = call('LLEN', KEYS[LEVELS + level]) end
for i = 1, workers do
  held = held + call('HLEN', KEYS[10 + i])
  read = read + call('HLEN', KEYS[10 + workers + i])
end
counts[5], counts[6], counts[7] = held, call('ZCARD', DELAYED), call('ZCARD', DEAD) + read
counts[8] = call('EXISTS', SEQ, WORKERS, unpack(KEYS, LEVELS + 1, LEVELS + 4))
return counts
"""

# KEYS[11]: a key that nobody uses. KEYS[12]: the last server's run id; ARGV: this one's. Calls each command that the other scripts
# call: what is forbidden fails here, where nothing is lost. On another server, or a restarted one, the numbers of jobs go on well behind
# the last: it may have lost the newest jobs, and a worker that still holds one of them must not settle another by its number.
_PROBE: Final = r"""
local kinds = {'string', 'hash', 'string', 'zset', 'zset', 'none', 'list', 'list', 'list', 'list'}
for i, kind in ipairs(kinds) do
  local found = call('TYPE', KEYS[i])['ok']
  if found ~= 'none' and found ~= kind then return KEYS[i] .. ' is a ' .. found .. ', not a ' .. kind end
end
local key = KEYS[11]
local function fresh() call('DEL', key) end
fresh()
call('RPUSH', key, 'x') call('LPUSH', key, 'x') call('LINDEX', key, 0) call('LLEN', key) call('LPOP', key)
fresh()
call('HSET', key, 'x', 1) call('HINCRBY', key, 'x', 1) call('HEXISTS', key, 'x') call('HGET', key, 'x') call('HMGET', key, 'x')
call('HGETALL', key) call('HVALS', key) call('HKEYS', key) call('HLEN', key) call('HDEL', key, 'x')
fresh()
call('ZADD', key, 1, 'x') call('ZRANGEBYSCORE', key, '-inf', 1, 'LIMIT', 0, 1) call('ZRANGE', key, 0, 0, 'WITHSCORES') call('ZCARD', key)
call('ZREM', key, 'x')
fresh()
call('SET', key, 1) call('GET', key) call('INCRBY', key, 1) call('EXISTS', key) call('UNLINK', key) call('TIME')
if ARGV[1] ~= '' and call('EXISTS', SEQ) == 1 and call('GET', KEYS[12]) ~= ARGV[1] then
  call('SET', KEYS[12], ARGV[1])
  call('INCRBY', SEQ, 1048576)
end
return ''
"""


def _script(text: str, *, always: bool = True) -> Script:
    flags = " flags=allow-oom" if always else ""
    return Script(f"#!lua{flags}\n{_COMMON}{text}")


TURN: Final = _script(_TURN)
ADDING_TURN: Final = _script(_TURN, always=False)
REGISTER: Final = _script(_REGISTER)
RELEASE: Final = _script(_RELEASE)
HELD: Final = _script(_HELD)
RETURN: Final = _script(_RETURN)
READ: Final = _script(_READ)
TAKE: Final = _script(_TAKE)
PURGE: Final = _script(_PURGE)
DEPTH: Final = _script(_DEPTH)
PROBE: Final = _script(_PROBE)
ROOM: Final = _script("return 1", always=False)
