"""What a rule is, and what it is shown: a block with each row's task history already attached."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Container, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, wraps
from typing import Any, ClassVar, TypeVar, cast

import numpy as np
import numpy.typing as npt

from divergence_probe.record.schema import (
    FLAGS,
    MISSING,
    NAMELESS,
    OUTER,
    QUERY,
    SUPPORT,
    Array,
    Block,
    Event,
    Flags,
)
from divergence_probe.record.task_rows import TaskRows
from divergence_probe.rules.finding import Finding, Mark, Severity
from divergence_probe.thresholds import Thresholds

_Quantity = TypeVar("_Quantity", bound=Callable[..., Array])

SECTIONS = ("What it does", "Why it is bad", "Example", "Use instead", "References")


@dataclass
class TaskFacts:
    """What is known of one task so far, carried from block to block until it ends.

    Attributes:
        index: of the task.
        data: of its ``task-start`` event.
        site: where it began, or None.
        start_norms: ``[P]`` norms before its first step, or None before one was seen.
        references: ``[P]`` the norms growth is measured against.
        first_loss: its first support loss; nan unknown.
        modes: effective modes seen by (phase, layer).
    """

    index: int
    data: dict[str, Any] = field(default_factory=dict)
    site: str | None = None
    start_norms: Array | None = None
    references: Array | None = None
    first_loss: float = float("nan")
    modes: dict[tuple[int, str], float] = field(default_factory=dict)


def once_a_frame(quantity: _Quantity) -> _Quantity:
    """A function of a frame that is computed once, for all rules; none may write to its result.

    What else it takes must be hashable.
    """

    @wraps(quantity)
    def known(frame: Frame, *arguments: Hashable) -> Array:
        key = (quantity, *arguments)
        if key not in frame.shared:
            frame.shared[key] = quantity(frame, *arguments)
        return frame.shared[key]

    return cast(_Quantity, known)


@dataclass
class Frame:
    """A block as rules see it.

    Attributes:
        block: the rows.
        tasks: facts of every task in the block, by index.
        start_norm: ``[S, P]`` norm of each parameter when the row's task began.
        growth: ``[S, P]`` norm after / norm at the task's start, small parameters measured against
            a fraction of the model's norm; nan where unknown.
        first_loss: ``[S]`` first support loss of the row's task.
        shared: what :func:`once_a_frame` has computed of it.
    """

    block: Block
    tasks: dict[int, TaskFacts]
    start_norm: Array
    growth: Array
    first_loss: Array
    shared: dict[Hashable, Array] = field(default_factory=dict, repr=False)

    @property
    def by_task(self) -> TaskRows:
        """The rows by task."""
        return self.block.by_task

    @property
    def task(self) -> Array:
        """``[S]`` task index."""
        return self.block.scalars["task"]

    @property
    def step(self) -> Array:
        """``[S]`` inner step."""
        return self.block.scalars["step"]

    @cached_property
    def support(self) -> Flags:
        """``[S]`` whether the row is an inner step."""
        return np.asarray(self.block.scalars["phase"] == SUPPORT)

    @cached_property
    def query(self) -> Flags:
        """``[S]`` whether the row is a query."""
        return np.asarray(self.block.scalars["phase"] == QUERY)

    @cached_property
    def outer(self) -> Flags:
        """``[S]`` whether the row is an outer step."""
        return np.asarray(self.block.scalars["phase"] == OUTER)

    @cached_property
    def seen(self) -> Flags:
        """``[S]`` whether the row is an inner step whose loss was seen."""
        return np.asarray(self.support & (self.block.scalars["loss_seen"] > 0))

    @cached_property
    def begins(self) -> Flags:
        """``[S]`` whether the row is a task's first inner step."""
        return np.asarray(self.support & (self.step == 0))

    @property
    def is_nameless(self) -> bool:
        """Whether no model owns what is adapted: an input, say, or weights in a list."""
        return all(info.name.startswith(NAMELESS) for info in self.block.layout.parameters)

    def flagged(self, *names: str) -> Flags:
        """``[S]`` whether a row has any of these :data:`FLAGS`."""
        return np.asarray((self._flags & sum(FLAGS[name] for name in names)) > 0)

    @cached_property
    def _flags(self) -> npt.NDArray[np.int_]:
        return self.block.scalars["flags"].astype(int)

    def events(self, kind: str) -> Sequence[Event]:
        """Events of one kind in this block."""
        return self.block.events_of(kind)

    @cached_property
    def unfinished(self) -> Flags:
        """``[S]`` rows of tasks that do not end in this block, and may have rows in the next."""
        open_ = [task not in self.block.ended for task in self.by_task.tasks]
        return np.asarray(open_, dtype=bool)[self.by_task.of_row]

    def of_tasks(self, chosen: Flags) -> Flags:
        """``[S]`` all rows of the tasks that have a row of ``chosen`` (``[S]``)."""
        return self.by_task.any(chosen)[self.by_task.of_row]

    def followed(self, tasks: Container[tuple[int, int]]) -> Flags:
        """``[S]`` rows of tasks that are among ``tasks``: by rank, and number within the run."""
        among = [(self.block.rank, task) in tasks for task in self.by_task.tasks]
        return np.asarray(among, dtype=bool)[self.by_task.of_row]

    def first_rows(self, hit: Flags) -> Iterator[int]:
        """For every task with a hit row, the first such row.

        Args:
            hit: ``[S]`` booleans.
        """
        if hit.any():
            first = self.by_task.first(hit)
            yield from np.sort(first[first >= 0]).tolist()

    def parameter(self, column: int) -> str:
        """Name of a parameter."""
        return self.block.layout.parameters[column].name

    def layer(self, column: int) -> str:
        """Dotted name of the module a parameter belongs to."""
        return self.block.layout.parameters[column].layer

    def called(self, layers: Sequence[str]) -> str:
        """Layers in a sentence: the first one's name, and how many more."""
        first, more = self.block.layout.spoken(layers[0]), len(layers) - 1
        return first + (f" and {more} more layer{'s' * (more > 1)}" if more else "")

    def normalization(self, column: int) -> str:
        """Name of a normalisation layer."""
        return self.block.layout.batch_norms[column]


class Rule:
    """One thing that can be wrong. Subclass it in a new file under ``rules/``.

    A rule is pure: it is shown frames in order and yields findings, at most one a task; what it
    has to remember from frame to frame it keeps on itself. Its docstring is its documentation, in
    the five :data:`SECTIONS`.
    """

    code: ClassVar[str]
    name: ClassVar[str]
    severity: ClassVar[Severity]
    cause: ClassVar[str | None] = None
    #: Whether one instance sees the frames of all ranks; else there is one for each rank.
    across_ranks: ClassVar[bool] = False
    #: What is counted where it is not told by where findings are: ``"step"``, say.
    unit: ClassVar[str | None] = None

    def __init__(self, thresholds: Thresholds) -> None:
        self.thresholds = thresholds

    def check(self, frame: Frame) -> Iterator[Finding]:
        """Findings of one frame."""
        yield from ()

    def finish(self) -> Iterator[Finding]:
        """Findings that need the whole run."""
        yield from ()

    def finding(self, message: str, **fields: Any) -> Finding:
        """A finding of this rule; severity and cause are the rule's unless given."""
        fields.setdefault("severity", self.severity)
        fields.setdefault("cause", self.cause)
        fields.setdefault("unit", self.unit or _unit(fields))
        return Finding(rule=self.code, name=self.name, message=message, **fields)

    def at(self, frame: Frame, row: int, message: str, text: str, **fields: Any) -> Finding:
        """A finding at one row, with the user's line of that row as its mark."""
        phase = ("support", "query", "outer")[int(frame.block.scalars["phase"][row])]
        task, step = int(frame.task[row]), int(frame.step[row])
        site = frame.block.site(row)
        fields.setdefault("marks", (Mark(site, text),) if site else ())
        fields.setdefault("task", task if task >= 0 else None)
        fields.setdefault("step", step if step >= 0 and phase == "support" else None)
        fields.setdefault("phase", phase)
        return self.finding(message, rank=frame.block.rank, **fields)

    @classmethod
    def documentation(cls) -> dict[str, str]:
        """The docstring's sections by title; the summary line under ``""``."""
        sections: dict[str, list[str]] = {"": []}
        current = ""
        for line in inspect.cleandoc(cls.__doc__ or "").splitlines():
            title = line.removeprefix("## ").strip()
            if line.startswith("## ") and title in SECTIONS:
                current = title
                sections[current] = []
            else:
                sections[current].append(line)
        return {title: "\n".join(lines).strip() for title, lines in sections.items()}


def _unit(fields: Mapping[str, Any]) -> str:
    if fields.get("phase") == "outer":
        return "outer step"
    return "task" if fields.get("task") is not None else "time"


def missing_to_nan(values: Array) -> Array:
    """Norms that were not there to be measured as nan."""
    return np.where(values == MISSING, np.nan, values)
