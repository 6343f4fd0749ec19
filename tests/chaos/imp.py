"""An imp in the broker: it doubles the messages on the queues and shuffles them, again and again, in one step each."""

import random
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import redis

_PAUSE_SECONDS = 0.02
# The queue is read, changed and written back while nobody else can do anything.
_SCRIPT = """
local changed = 0
math.randomseed(tonumber(ARGV[1]))
for _, key in ipairs(KEYS) do
  local found = redis.call('LRANGE', key, 0, -1)
  local count = #found
  if count > 0 then
    if count < tonumber(ARGV[2]) then
      for number = 1, count do
        if math.random() < 0.5 then found[#found + 1] = found[number] end
      end
    end
    for number = #found, 2, -1 do
      local other = math.random(number)
      found[number], found[other] = found[other], found[number]
    end
    redis.call('DEL', key)
    for _, element in ipairs(found) do redis.call('RPUSH', key, element) end
    changed = changed + #found - count
  end
end
return changed
"""
MOST_ELEMENTS = 12  # a queue that has so many is not doubled any more


@contextmanager
def imp(url: str, queues: Sequence[str], *, seed: int) -> Iterator[list[int]]:
    """Let the imp at the queues until the block ends; what is given grows by the number it has doubled each time."""
    chance = random.Random(seed)
    done = threading.Event()
    doubled: list[int] = []

    def play() -> None:
        with redis.Redis.from_url(url) as client:
            script = client.register_script(_SCRIPT)
            while not done.wait(_PAUSE_SECONDS):
                try:
                    doubled.append(int(script(keys=queues, args=[chance.randrange(2**31), MOST_ELEMENTS])))
                except redis.RedisError:  # the broker is away; so is the imp
                    continue

    thread = threading.Thread(target=play, name="imp", daemon=True)
    thread.start()
    try:
        yield doubled
    finally:
        done.set()
        thread.join()
