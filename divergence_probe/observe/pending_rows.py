"""Rows that are kept by reference until they are measured, and the blocks they go out in.

A block is closed when 1024 rows or much memory are pending, about once a second, or when a loss
turns non-finite (at every task's end and row where the user is to be stopped at the first finding).
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from divergence_probe.observe.at_hand import waits_for_nothing
from divergence_probe.observe.capture import Number, Row
from divergence_probe.observe.statistics import build_block
from divergence_probe.observe.task import Task
from divergence_probe.record.schema import Block, Event, Layout, empty_block, joined

_ROWS_PER_BLOCK = 1024
BYTES_PER_BLOCK = 32 * 2**20
# Rows whose tensors are kept: fewer would be measured with as many calls, more leave the caches.
_ROWS_AT_ONCE = 128
# Closing blocks by the clock may take so much of the time, or it is done less often, within limits.
_SECONDS_PER_BLOCK, _SECONDS_AT_MOST = 1.0, 5.0
_SHARE_OF_TIME = 0.003
# Rows held of what may turn out to be a task: of a model that is stepped itself, as in ordinary
# training (or in training before the tasks); and of copies, and of what no model owns.
_ROWS_HELD, _OTHER_ROWS_HELD = 32, 128


class Sink(Protocol):
    """Where measured blocks go: the writer and the rules."""

    def block(self, block: Block) -> None:
        """Take a closed block; may raise DivergenceDetected when the user asked for it."""


class PendingRows:
    """The rows and events of the block to come.

    Args:
        sink: takes closed blocks.
        layouts: of the models known so far, by index; grows.
        sites: the table behind the rows' sites; grows.
        rank: of this process.

    Attributes:
        eager: whether every row closes a block.
        measured: called with each block, before the sink takes it.
        events: those of the block to come.
    """

    def __init__(self, sink: Sink, layouts: list[Layout], sites: list[str], rank: int) -> None:
        self.eager = False
        self.measured: list[Callable[[Block], None]] = []
        self.events: list[Event] = []
        self._sink = sink
        self._layouts = layouts
        self._sites = sites
        self._rank = rank
        self._flushed = time.perf_counter()
        self._pause = _SECONDS_PER_BLOCK
        self._rows: list[Row] = []
        self._aside: list[Row] = []
        self._parts: list[Block] = []
        self._measured_rows = 0
        self._room = BYTES_PER_BLOCK
        self._sizes: dict[tuple[int, int], int] = {}
        self._layout = -1
        self._lock = threading.RLock()

    def add(self, row: Row) -> None:
        """Keep a row; where it is time, measure what is kept."""
        with self._lock:
            if row.layout != self._layout:
                if self._rows:
                    self.flush()
                self._layout = row.layout
            self._rows.append(row)
            self._room -= self._room_of(row)
            loss = row.loss
            alarming = not math.isfinite(loss) if type(loss) is float else _alarming(loss)
            if alarming or self.eager:
                self.flush()
            elif self._room < 0:
                self._make_room(row)

    def set_aside(self, row: Row) -> None:
        """Keep an outer step of what no task adapts until the block of the tasks is closed.

        It gets a block of its own, for a block has one layout; in its place in the order of time
        that would end the block of the tasks at every outer step.
        """
        with self._lock:
            if not self._rows or row.layout == self._layout:
                self.add(row)
                return
            self._aside.append(row)
            self._room -= self._room_of(row)
            if self.eager or self._room < 0:
                self.flush()

    def hold(self, task: Task, row: Row) -> None:
        """Keep a provisional task's row, but never many: ordinary training goes on for ever."""
        itself = task.base is None and task.known.model is not None
        most = _ROWS_HELD if itself else _OTHER_ROWS_HELD
        row.previous = None if len(task.held) >= most else row.previous
        task.held.append(row)
        if len(task.held) > most or self._room_of(row) * len(task.held) > BYTES_PER_BLOCK:
            del task.held[0]
            task.held[0].previous = None

    def is_due(self) -> bool:
        """Whether it is time to close a block between two tasks."""
        return self.eager or time.perf_counter() - self._flushed > self._pause

    def flush(self) -> None:
        """Measure the pending rows and hand them on as a block."""
        started = time.perf_counter()
        with self._lock:
            rows, self._rows = self._rows, []
            aside, self._aside = self._aside, []
            self._measured_rows, self._room = 0, BYTES_PER_BLOCK
            events, self.events = self.events, []
            if not rows and not events:
                return
            blocks = [self._block(rows, events)]
            for layout in dict.fromkeys(row.layout for row in aside):
                blocks.append(self._block([row for row in aside if row.layout == layout], []))
        for block in blocks:
            self._sink.block(block)
        self._flushed = time.perf_counter()
        wanted = (self._flushed - started) / _SHARE_OF_TIME
        self._pause = min(max(_SECONDS_PER_BLOCK, wanted), _SECONDS_AT_MOST)

    def _make_room(self, latest: Row) -> None:
        """Measure what is pending, but for the last row: a second optimizer may still complete it.

        A block is closed once enough of its rows are measured.
        """
        if self._measured_rows + len(self._rows) > _ROWS_PER_BLOCK:
            self.flush()
            return
        self._part(self._rows[:-1])
        self._rows = [latest]
        self._room = BYTES_PER_BLOCK - self._room_of(latest)

    def _room_of(self, row: Row) -> int:
        """What a row takes of the bytes that may be kept alive, so that few enough are pending."""
        if row.before is row.after:  # (a query keeps no weights)
            return BYTES_PER_BLOCK // _ROWS_AT_ONCE
        known = self._sizes.get((row.layout, row.width))
        if known is None:
            size = 3 * row.width * _bytes_of(self._layouts[row.layout])
            known = max(size, BYTES_PER_BLOCK // _ROWS_AT_ONCE)
            self._sizes[row.layout, row.width] = known
        return known

    def _block(self, rows: list[Row], events: list[Event]) -> Block:
        """What is measured of the pending rows of one layout, with the rest of them."""
        self._part(rows)
        parts, self._parts = self._parts, []
        block = joined(parts, events) if parts else self._empty(events)
        for measured in self.measured:
            measured(block)
        return block

    def _part(self, rows: list[Row]) -> None:
        """Measure some rows of the block to come, and let go of their tensors."""
        if not rows:
            return
        layout = self._layouts[rows[0].layout]
        with _no_user_modes():
            self._parts.append(build_block(rows, layout, self._sites, [], self._rank))
        self._measured_rows += len(rows)
        for row in rows:
            row.previous = row.preceding = None

    def _empty(self, events: list[Event]) -> Block:
        layout = self._layouts[0] if self._layouts else Layout(0, "", ())
        return empty_block(layout, self._sites, events, self._rank)


def _bytes_of(layout: Layout) -> int:
    """What one set of a layout's parameters takes."""
    return sum(
        math.prod(info.shape) * getattr(torch, info.dtype).itemsize for info in layout.parameters
    )


def _alarming(loss: Number) -> bool:
    """Whether a loss is visibly non-finite, looked at only where that needs no GPU sync."""
    if loss is None:
        return False
    if isinstance(loss, Tensor):
        if not waits_for_nothing(loss) or loss.numel() != 1:
            return False
        loss = loss.item()
    return not math.isfinite(loss)


def _no_user_modes() -> AbstractContextManager[Any]:
    """A user's dispatch mode (a flop counter, say) must not see our arithmetic."""
    if torch._C._len_torch_dispatch_stack() == 0:
        return nullcontext()
    return _disable_current_modes()
