"""The voice of a broker: each queue has its own driver, and an outage of the server is said once for all of them."""

from __future__ import annotations

import logging
from typing import Final

log = logging.getLogger("leveret.redis")
_OF_OUTAGES: Final = ("%s can't be written", "%s can be written again", "%s confirms")


class _OneVoice(logging.Filter):
    """Drops what another queue of the same broker has said of the same outage."""

    _last = ""

    def filter(self, record: logging.LogRecord) -> bool:
        """As `logging.Filter`."""
        line = str(record.msg)
        if not line.startswith(_OF_OUTAGES):
            return True
        new, self._last = line != self._last, line
        return new


def shared_log() -> logging.Logger:
    """Return a logger for all queues of a broker: an outage is said once."""
    shared = logging.Logger(log.name)  # noqa: LOG001 - its filter is this broker's, and nobody looks it up
    shared.parent = log
    shared.addFilter(_OneVoice())
    return shared
