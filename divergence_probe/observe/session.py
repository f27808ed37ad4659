"""What is known of the run right now: open tasks, and what is common to all who look at them.

Instruments and library adapters report here in the words of the field (a task starts, an inner step
was taken, the outer optimizer stepped); the session gives indices, and what is to be measured goes
to the pending rows.
"""

from __future__ import annotations

import itertools
import math
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from divergence_probe.observe.at_hand import no_difference, worth_a_wait
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
from divergence_probe.observe.pending_rows import PendingRows, Sink
from divergence_probe.observe.retention import Retention
from divergence_probe.observe.snapshot import shapes_of
from divergence_probe.observe.task import Task, ThreadForwards
from divergence_probe.record.schema import (
    FLAGS,
    OUTER,
    QUERY,
    SUPPORT,
    Event,
)


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
        self.rows = PendingRows(sink, self.models.layouts, self.sites.table, rank)
        self.loose = ThreadForwards()
        self.open: list[Task] = []
        self.adapters: list[str] = []
        self.bases: set[KnownModel] = set()
        self.incomplete: dict[str, None] = {}
        self.phase: str | None = None
        self.label: str | None = None
        self.closing: list[Callable[[], None]] = []
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
        #: Called with a module that has loaded a state.
        self.loaded: list[Callable[[nn.Module], None]] = []
        self.starting: list[Callable[[], None]] = []
        #: Called with a task that has begun.
        self.begun: list[Callable[[Task], None]] = []
        #: Called at the end, when every gradient was settled.
        self.settled: list[Callable[[], None]] = []
        #: How many tasks have begun, ordinary training that looks like one among them.
        self.tasks_begun = 0
        self.clipped: bool | Tensor | None = None
        #: The norm of the gradients before they were clipped by it, where that is at hand.
        self.unclipped: float | None = None
        self._retention = Retention()
        self.layer_names = LayerNames(self.models)
        self.name_forwards = self.layer_names.give
        self._last_rows: dict[int, Row] = {}
        self._started = time.perf_counter()
        self._indices = itertools.count()
        self._cut_short = 0
        self._copied: tuple[Task | None, set[int]] = (None, set())
        #: Running means that were loaded with a state, by identity, until a task runs with them (or
        #: they are gone).
        self.reloaded: dict[int, weakref.ref[Tensor]] = {}
        self._taking_turns: set[KnownModel] = set()

    # -- what happened ------------------------------------------------------------------------

    def seconds(self) -> float:
        """Since the probe was attached."""
        return time.perf_counter() - self._started

    def event(self, kind: str, task: Task | None = None, site: int = -1, **data: Any) -> None:
        """Something that happened once."""
        self.rows.events.append(
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
        self.tasks_begun += 1
        for begun in self.begun:
            begun(task)
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
        """The adapted weights were used: a forward, and maybe a gradient, after the last step.

        What ran with weights that the task has others of is left out: the base is trained on, say.
        """

        def is_strange(weight: Tensor) -> bool:
            owner = self.models.find(weight)
            return owner is not None and task.left_behind(weight, *owner)

        forwards.leave_out(is_strange)
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
        if self.unclipped is not None and math.isfinite(self.unclipped):
            data["unclipped_norm"] = self.unclipped
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
            self.rows.set_aside(row)
        else:
            self._add(row, None)

    def _clipping(self, flags: int) -> tuple[Tensor | None, int]:
        """Flags with those of the clipping since the step before; what is read later."""
        clipped, self.clipped, self.unclipped = self.clipped, None, None
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
        task = self.of_library()
        return task.forwards if task is not None else self.loose.forwards

    def of_library(self) -> Task | None:
        """The latest open task of a library's own loop, which may be a query's by now."""
        for task in reversed(self.open):
            if task.module_names is not None:
                return task
        return None

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
        kept = self._retention.ended(task.site, [*task.fast, *task.began], task.graph)
        if kept is not None:
            self.event("graph-retained", task, kept[1], tasks=kept[0])
        if self.rows.is_due():
            self.flush()

    def discard(self, task: Task) -> None:
        """A provisional task turned out to be none."""
        task.ended, task.held = True, []
        if task in self.open:
            self.open.remove(task)

    def end_tasks(self) -> None:
        """Every task ends here, by the user's word."""
        self._settle()
        self.finish_tasks()

    def _settle(self) -> None:
        """Nothing more will be seen of what is under way: decide what it was."""
        for settling in (*self.closing, *self.settled):
            settling()

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
                self.rows.hold(task, row)
                return
        self.rows.add(row)

    def _note_whose(self, forwards: Forwards, task: Task, base: KnownModel) -> None:
        """Whether the statistics of a copy are the base's, or all tasks' at least.

        One copy that every task loads its weights into passes its statistics on, unless it loads
        those as well; where copies take turns (each client has one), they are each one's own.
        """
        buffers = {call.buffers for call in forwards.normalizations}
        last, theirs = self._copied
        if last is not task:
            if last is not None and theirs and theirs.isdisjoint(buffers):
                self._taking_turns.add(base)
            self._copied = task, buffers
        for call in forwards.normalizations:
            if self.reloaded.pop(call.buffers, None) is not None:
                task.own_statistics.add(call.buffers)
            if base in self._taking_turns or call.buffers in task.own_statistics:
                call.shared &= call.buffers in base.buffer_ids

    def flush(self) -> None:
        """Measure what is pending and hand it on."""
        self.rows.flush()

    def cut_off(self) -> None:
        """An exception ended the run: a copy in its first task had no chance to be followed."""
        for task in [t for t in self.open if t.provisional and t.base is not None]:
            self.confirm(task)

    def close(self) -> None:
        """End everything that is open and hand on what is left."""
        self._settle()
        for task in list(self.open):
            self.finish_task(task)
        kept = self._retention.closed()
        if kept is not None:
            self.event("graph-retained", None, kept[1], tasks=kept[0])
        self.flush()
