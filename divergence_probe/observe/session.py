"""What is known of the run right now: open tasks, pending rows, and the way out to the recording.

Instruments and library adapters report here in the words of the field (a task starts, an inner step
was taken, the outer optimizer stepped); the session gives indices, keeps rows by reference and
closes a block when 1024 rows or much memory are pending, about once a second, or when a loss turns
non-finite (at every task's end and row where the user is to be stopped at the first finding).
"""

from __future__ import annotations

import itertools
import math
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from divergence_probe.observe.at_hand import no_difference, waits_for_nothing, worth_a_wait
from divergence_probe.observe.callsite import CallSites
from divergence_probe.observe.capture import (
    NO_FORWARDS,
    Forwards,
    Number,
    Row,
)
from divergence_probe.observe.guard import Guard
from divergence_probe.observe.models import KnownModel, Models, is_compiled
from divergence_probe.observe.naming import LayerNames
from divergence_probe.observe.retention import Retention
from divergence_probe.observe.snapshot import shapes_of
from divergence_probe.observe.statistics import build_block
from divergence_probe.observe.task import Task, ThreadForwards
from divergence_probe.record.schema import (
    FLAGS,
    OUTER,
    QUERY,
    SUPPORT,
    Block,
    Event,
    Layout,
    empty_block,
    joined,
)

_ROWS_PER_BLOCK = 1024
_BYTES_PER_BLOCK = 32 * 2**20
# Rows whose tensors are kept: fewer would be measured with as many calls, more leave the caches.
_ROWS_AT_ONCE = 128
# Closing blocks by the clock may take so much of the time, or it is done less often, within limits.
_SECONDS_PER_BLOCK, _SECONDS_AT_MOST = 1.0, 5.0
_SHARE_OF_TIME = 0.003
_ROWS_HELD = 32


class Sink(Protocol):
    """Where measured blocks go: the writer and the rules."""

    def block(self, block: Block) -> None:
        """Take a closed block; may raise DivergenceDetected when the user asked for it."""


class Session:
    """The run as observed so far; see the module's docstring.

    Args:
        sink: takes closed blocks.
        guard: timing and the off switch.
        rank: of this process.
    """

    def __init__(self, sink: Sink, guard: Guard, rank: int = 0) -> None:
        self.guard = guard
        self.models = Models()
        self.sites = CallSites()
        self.loose = ThreadForwards()
        self.open: list[Task] = []
        self.adapters: list[str] = []
        self.bases: set[KnownModel] = set()
        self.incomplete: dict[str, None] = {}
        self.eager = False
        self.phase: str | None = None
        self.label: str | None = None
        self.closing: list[Callable[[], None]] = []
        self.measured: list[Callable[[Block], None]] = []
        #: Instruments that others ask for, by class. (Kept here and nowhere else: they refer to the
        #: session, so that in a table of sessions, even a weak one, none would ever be let go.)
        self.instruments: dict[type, object] = {}
        self.inner: tuple[Any, ...] = ()
        self.adapted_by_hand: set[KnownModel] = set()
        #: Bases whose tasks make new tensors: a gradient may come back to them.
        self.unrolled: set[KnownModel] = set()
        #: Bases that took an outer step since the last of their tasks began.
        self.just_stepped: set[KnownModel] = set()
        #: Optimizers that took outer steps: what is in their state is of the base's own training.
        self.outer_optimizers: weakref.WeakSet[Any] = weakref.WeakSet()
        self.restoring: list[Callable[[Task], None]] = []
        #: Called with a module whose state is asked for, or that is copied: it may be kept.
        self.keeping: list[Callable[[nn.Module], None]] = []
        self.starting: list[Callable[[], None]] = []
        self.clipped: bool | Tensor | None = None
        self._retention = Retention()
        self.layer_names = LayerNames(self.models)
        self.name_forwards = self.layer_names.give
        self._last_rows: dict[int, Row] = {}
        self._sizes: dict[tuple[int, int], int] = {}
        self._sink = sink
        self._rank = rank
        self._started = self._flushed = time.perf_counter()
        self._pause = _SECONDS_PER_BLOCK
        self._indices = itertools.count()
        self._rows: list[Row] = []
        self._aside: list[Row] = []
        self._parts: list[Block] = []
        self._measured_rows = 0
        self._cut_short = 0
        self._copied: tuple[Task | None, set[int]] = (None, set())
        self._taking_turns: set[KnownModel] = set()
        self._room = _BYTES_PER_BLOCK
        self._layout = -1
        self._events: list[Event] = []
        self._lock = threading.RLock()

    # -- what happened ------------------------------------------------------------------------

    def seconds(self) -> float:
        """Since the probe was attached."""
        return time.perf_counter() - self._started

    def event(self, kind: str, task: Task | None = None, site: int = -1, **data: Any) -> None:
        """Something that happened once."""
        self._events.append(
            Event(
                kind,
                task.index if task is not None else -1,
                task.steps if task is not None else -1,
                self.seconds(),
                self.sites.name(site),
                data,
            )
        )

    def unseen(self, sentence: str) -> None:
        """Say, once, what could not be observed and how it could be."""
        if sentence not in self.incomplete:
            self.incomplete[sentence] = None
            self.event("incomplete", None, -1, reason=sentence)

    def start_task(
        self,
        known: KnownModel,
        adapter: str,
        site: int,
        width: int = 1,
        base: KnownModel | None = None,
        provisional: bool = False,
        **data: Any,
    ) -> Task:
        """An inner loop begins on ``known``.

        Args:
            known: names its parameters.
            adapter: how it is seen.
            site: the user's line.
            width: number of tasks batched by vmap.
            base: the model it starts from, where an outer step would move other tensors than the
                inner one does.
            provisional: it may turn out to be ordinary training: hold it until :meth:`confirm`.
            data: facts for the ``task-start`` event.
        """
        for starting in self.starting:
            starting()
        provisional = provisional and self.label is None  # what the user calls a task is one
        task = Task(-1, known, adapter, site, width, base=base, provisional=provisional)
        names = {"adapter": adapter, "model": known.layout.model, "instance": known.serial}
        task.data = {**names, "width": width, **data}
        if self.label is not None:
            task.data["label"] = self.label
        if self.phase == "meta-test":
            task.data["meta_test"] = True
        if not provisional:
            self._number(task)
            self.event("task-start", task, site, **task.data)
        self.open.append(task)
        if base is not None:
            self.bases.add(base)
            self.just_stepped.discard(base)
            if not data.get("in_place"):
                self.unrolled.add(base)
        return task

    def _number(self, task: Task) -> None:
        task.index = next(self._indices)
        for _ in range(task.width - 1):
            next(self._indices)

    def confirm(self, task: Task) -> None:
        """A provisional task is an inner loop after all: record what was held."""
        if not task.provisional:
            return
        task.provisional = False
        self._number(task)
        steps, task.steps = task.steps, 0
        self.event("task-start", task, task.site, **task.data)
        task.steps = steps
        held, task.held = task.held, []
        self._cut_short += len(held) < task.steps
        if self._cut_short > 1:  # (the first may be a training before)
            self.unseen(
                "A loop was known to be an inner one only after many steps, of which the first "
                "were not kept."
            )
        for row in held:
            row.task = task.index
            self._add(row, task)
        if task.ended:
            self.event("task-end", task, -1, steps=task.steps)

    def step(
        self,
        task: Task,
        before: Sequence[Tensor | None],
        after: Sequence[Tensor | None],
        gradients: Sequence[Tensor | None],
        *,
        loss: Number,
        learning_rate: Number,
        site: int,
        forwards: Forwards,
        flags: int = 0,
        width: int = 1,
        carried: Sequence[Tensor] = (),
    ) -> Row:
        """An inner step was taken. Tensors must be detached and safe from in-place changes."""
        if isinstance(learning_rate, Tensor):  # a learned rate is stepped before it is measured
            learning_rate = learning_rate.detach().clone()
        clipped = None
        if self.clipped is not None:
            clipped, flags = self._clipping(flags)
        row = Row(
            task.index,
            task.steps,
            QUERY if self.phase == "query" else SUPPORT,
            task.known.layout.index,
            site,
            time.perf_counter() - self._started,
            before,
            after,
            gradients,
            forwards if forwards is NO_FORWARDS else forwards.measurable(),
            loss,
            learning_rate,
            flags,
            width if width > 1 else task.width,
            task.last,
            carried,
            clipped=clipped,
        )
        if task.first is None:
            task.first = row
            if learning_rate is None:  # by hand: its optimizer's state is not seen
                row.preceding = self._last_rows.get(row.layout)
        self._last_rows[row.layout] = task.last = row
        task.steps += 1
        self._add(row, task)
        return row

    def query(
        self,
        task: Task,
        forwards: Forwards,
        loss: Number,
        site: int,
        flags: int = 0,
        gradients: Sequence[Tensor] = (),
    ) -> None:
        """The adapted weights were used: a forward, and maybe a gradient, after the last step."""
        nothing = [None] * len(task.known.layout.parameters)
        row = Row(
            task.index,
            task.steps,
            QUERY,
            task.known.layout.index,
            site,
            self.seconds(),
            nothing,
            nothing,
            nothing,
            forwards.measurable(),
            loss if loss is not None else forwards.loss,
            None,
            flags,
            task.width,
            carried=gradients,
        )
        self._add(row, task)

    def outer_step(
        self,
        known: KnownModel,
        before: Sequence[Tensor | None],
        after: Sequence[Tensor | None],
        gradients: Sequence[Tensor | None],
        *,
        learning_rate: Number,
        site: int,
        flags: int = 0,
        around: bool = False,
        **data: Any,
    ) -> None:
        """The outer optimizer moved the base's weights ("incomplete": its gradient is unknown).

        Or, ``around`` them, what no task adapts: rates, a network they are a part of.
        """
        self.finish_tasks()
        clipped, flags = self._clipping(flags)
        row = Row(
            -1,
            -1,
            OUTER,
            known.layout.index,
            site,
            self.seconds(),
            before,
            after,
            gradients,
            NO_FORWARDS,
            None,
            learning_rate,
            flags,
            clipped=clipped,
        )
        self._retention.outer_step()
        missing = [
            info.name
            for info, gradient, parameter in zip(
                known.layout.parameters, shapes_of(gradients), shapes_of(before), strict=True
            )
            if gradient is None and parameter is not None and not flags & FLAGS["incomplete"]
        ]
        self.event("outer-step", None, site, without_gradient=missing, **data)
        if around:
            self._set_aside(row)
        else:
            self._add(row, None)

    def _clipping(self, flags: int) -> tuple[Tensor | None, int]:
        """Flags with those of the clipping since the step before; what is read later."""
        clipped, self.clipped = self.clipped, None
        if clipped is None:
            return None, flags
        if isinstance(clipped, Tensor):
            return clipped, flags | FLAGS["clippable"]
        return None, flags | FLAGS["clippable"] | (FLAGS["clipped"] if clipped else 0)

    def runs_base_weights(self, bases: Sequence[Tensor], site: int) -> None:
        """A copy was adapted by a loss that depends on the original's weights instead."""
        found = self.models.find(bases[0]) or (
            (known, 0) if (known := self.models.discover(bases)) is not None else None
        )
        model = found[0].model() if found is not None and found[0].model is not None else None
        task = self.open[-1] if self.open else None
        compiled = model is not None and is_compiled(model)
        self.event("runs-base-weights", task, site, compiled=compiled)

    def adapting(self, module: nn.Module) -> list[Task]:
        """Open tasks that adapt ``module``'s own parameters in place."""
        parameters = {id(parameter) for parameter in module.parameters()}
        return [
            task
            for task in self.open
            if task.in_place and any(r is not None and id(r()) in parameters for r in task.fast)
        ]

    def restored(self, tasks: Sequence[Task], site: int) -> None:
        """``load_state_dict`` was called on what ``tasks`` adapted: they are over.

        Where it put back the very weights the task ended with, the restore had no effect: the
        state was kept by reference, not copied.
        """
        for task in tasks:
            for ending in self.restoring:  # (its last update may still have to be settled)
                ending(task)
            first, end = task.first, task.adapted
            if task.ended and first is not None and end is not None:
                adapted = not no_difference(first.before, end, worth_a_wait)
                current = [r() if r is not None else None for r in task.fast]
                if adapted and no_difference(current, end, worth_a_wait):
                    self.event("restore-without-effect", None, site)

    def current_forwards(self) -> Forwards:
        """Where a forward that names no module belongs: the open task's, else the thread's."""
        if self.open:
            for task in reversed(self.open):
                if task.module_names is not None:
                    return task.forwards
        return self.loose.forwards

    def finish_task(self, task: Task) -> None:
        """The inner loop ended; forwards nobody took a gradient of become its query row."""
        if task.ended:
            return
        task.ended = True
        if task in self.open:
            self.open.remove(task)
        if task.forwards and task.steps:
            self.query(task, task.forwards.take(), None, -1)
        if task.last is not None:
            task.came_to, task.last = task.last.after, None
        if task.provisional:
            return
        self.event("task-end", task, -1, steps=task.steps)
        kept = self._retention.ended(task.site, [*task.fast, *task.began])
        if kept is not None:
            self.event("graph-retained", task, kept[1], tasks=kept[0])
        if self.eager or time.perf_counter() - self._flushed > self._pause:
            self.flush()

    def discard(self, task: Task) -> None:
        """A provisional task turned out to be none."""
        task.ended, task.held = True, []
        if task in self.open:
            self.open.remove(task)

    def end_tasks(self) -> None:
        """Every task ends here, by the user's word."""
        for closing in self.closing:
            closing()
        self.finish_tasks()

    def finish_tasks(self) -> None:
        """Every open task of this thread ended."""
        mine = threading.get_ident()
        for task in list(self.open):
            if task.thread == mine:
                self.finish_task(task)

    # -- pending rows ---------------------------------------------------------------------------

    def _add(self, row: Row, task: Task | None) -> None:
        if task is not None:
            if row.forwards is not NO_FORWARDS:
                self.name_forwards(row.forwards, task.known, task)
                if task.in_place and task.base is not None:
                    self._note_whose(row.forwards, task, task.base)
            if task.provisional:
                self._hold(task, row)
                return
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

    def _note_whose(self, forwards: Forwards, task: Task, base: KnownModel) -> None:
        """Whether the statistics of a copy are the base's, or all tasks' at least.

        One copy that every task loads its weights into passes its statistics on; where copies take
        turns (each client has one), they are each one's own.
        """
        buffers = {call.buffers for call in forwards.normalizations}
        last, theirs = self._copied
        if last is not task:
            if last is not None and theirs and theirs.isdisjoint(buffers):
                self._taking_turns.add(base)
            self._copied = task, buffers
        if base in self._taking_turns:
            for call in forwards.normalizations:
                call.shared &= call.buffers in base.buffer_ids

    def _set_aside(self, row: Row) -> None:
        """Keep an outer step of what no task adapts until the block of the tasks is closed.

        It gets a block of its own, for a block has one layout; in its place in the order of time
        that would end the block of the tasks at every outer step.
        """
        with self._lock:
            if not self._rows or row.layout == self._layout:
                self._add(row, None)
                return
            self._aside.append(row)
            self._room -= self._room_of(row)
            if self.eager or self._room < 0:
                self.flush()

    def _make_room(self, latest: Row) -> None:
        """Measure what is pending, but for the last row: a second optimizer may still complete it.

        A block is closed once enough of its rows are measured.
        """
        if self._measured_rows + len(self._rows) > _ROWS_PER_BLOCK:
            self.flush()
            return
        self._part(self._rows[:-1])
        self._rows = [latest]
        self._room = _BYTES_PER_BLOCK - self._room_of(latest)

    def _room_of(self, row: Row) -> int:
        """What a row takes of the bytes that may be kept alive, so that few enough are pending."""
        if row.before is row.after:  # (a query keeps no weights)
            return _BYTES_PER_BLOCK // _ROWS_AT_ONCE
        known = self._sizes.get((row.layout, row.width))
        if known is None:
            size = 3 * row.width * _bytes_of(self.models.layouts[row.layout])
            known = max(size, _BYTES_PER_BLOCK // _ROWS_AT_ONCE)
            self._sizes[row.layout, row.width] = known
        return known

    def _hold(self, task: Task, row: Row) -> None:
        """Keep a provisional task's row, but never many: ordinary training goes on for ever."""
        row.previous = None if len(task.held) >= _ROWS_HELD else row.previous
        task.held.append(row)
        if len(task.held) > _ROWS_HELD or self._room_of(row) * len(task.held) > _BYTES_PER_BLOCK:
            del task.held[0]
            task.held[0].previous = None

    def flush(self) -> None:
        """Measure the pending rows and hand them on as a block."""
        started = time.perf_counter()
        with self._lock:
            rows, self._rows = self._rows, []
            aside, self._aside = self._aside, []
            self._measured_rows, self._room = 0, _BYTES_PER_BLOCK
            events, self._events = self._events, []
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
        layout = self.models.layouts[rows[0].layout]
        with _no_user_modes():
            self._parts.append(build_block(rows, layout, self.sites.table, [], self._rank))
        self._measured_rows += len(rows)
        for row in rows:
            row.previous = row.preceding = None

    def _empty(self, events: list[Event]) -> Block:
        layouts = self.models.layouts
        layout = layouts[0] if layouts else Layout(0, "", ())
        return empty_block(layout, self.sites.table, events, self._rank)

    def cut_off(self) -> None:
        """An exception ended the run: a copy in its first task had no chance to be followed."""
        for task in [t for t in self.open if t.provisional and t.base is not None]:
            self.confirm(task)

    def close(self) -> None:
        """End everything that is open and hand on what is left."""
        for closing in self.closing:
            closing()
        for task in list(self.open):
            self.finish_task(task)
        kept = self._retention.closed()
        if kept is not None:
            self.event("graph-retained", None, kept[1], tasks=kept[0])
        self.flush()


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
