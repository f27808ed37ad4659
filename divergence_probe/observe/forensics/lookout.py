"""Losses of an accelerator that turn bad, noticed without waiting for it.

Each loss is sent to the host while the run goes on, and read when it has come: most often by the
next step, before the outer step that would spoil the weights all tasks begin with.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from typing import Any

import torch
from torch import Tensor

# Losses on their way at a time; where the device is further behind, some are not sent.
_MOST_UNDER_WAY = 16


class Lookout(threading.local):
    """One thread's losses that are on their way."""

    def __init__(self) -> None:
        #: a loss on the host, and the event after which it is there (None: it is)
        self._under_way: deque[tuple[Tensor, Any]] = deque()

    def notices(self, loss: Tensor) -> bool:
        """Send a loss; whether one sent before is seen to be bad by now.

        Args:
            loss: plain, of one element, detached.
        """
        if not (loss.is_cuda or loss.is_cpu):
            return False  # another accelerator would be waited for
        if loss.is_cuda and torch.cuda.is_current_stream_capturing():
            return False
        if len(self._under_way) < _MOST_UNDER_WAY:
            self._under_way.append(_sent(loss))
        bad = False
        while self._under_way:
            value, there = self._under_way[0]
            if value is loss or not (there is None or there.query()):
                break
            self._under_way.popleft()
            bad |= not math.isfinite(value.item())
        return bad


def _sent(loss: Tensor) -> tuple[Tensor, Any]:
    if not loss.is_cuda:
        return loss, None
    with torch.cuda.device(loss.device):
        value = torch.empty_like(loss, device="cpu", pin_memory=True)
        value.copy_(loss, non_blocking=True)
        there = torch.cuda.Event()  # type: ignore[no-untyped-call]
        there.record()
    return value, there
