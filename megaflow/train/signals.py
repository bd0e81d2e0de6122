"""SIGTERM and SIGINT end a run cleanly: the step in hand is finished, a checkpoint saved."""

from __future__ import annotations

import signal
from types import FrameType


class StopSignal:
    """Remembers that a signal asked the run to stop. A second SIGINT ends the process at once.

    The ranks agree on it in the step's own reduction: a signal to any one of them stops all after the same step.
    """

    def __init__(self) -> None:
        self.requested = False
        signal.signal(signal.SIGTERM, self._request)
        signal.signal(signal.SIGINT, self._request)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
