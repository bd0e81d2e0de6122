"""SIGTERM and SIGINT end a run cleanly: the step in hand is finished, a checkpoint saved."""

from __future__ import annotations

import signal
import time
from types import FrameType

# Ctrl-C reaches a rank twice, from the terminal and forwarded by torchrun
SAME_REQUEST = 2.0


class StopSignal:
    """Remembers that a signal asked the run to stop; SIGINT again, more than two seconds later, ends it at once.

    The ranks agree on it in the step's own reduction: a signal to any one of them stops all after the same step.
    """

    def __init__(self) -> None:
        self.requested_at: float | None = None
        signal.signal(signal.SIGTERM, self._request)
        signal.signal(signal.SIGINT, self._request)

    @property
    def requested(self) -> bool:
        return self.requested_at is not None

    def _request(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.requested_at is None:
            self.requested_at = now
        elif number == signal.SIGINT and now - self.requested_at > SAME_REQUEST:
            raise KeyboardInterrupt
