"""The shape of a recording: which columns a step has, what they mean, and their units.

A recording is a folder: ``meta.json`` and, for each rank, two Arrow IPC streams,
``rank-N/steps.arrow`` and ``rank-N/events.arrow``. Arrow readers (pandas, polars, DuckDB) read the
streams as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from divergence_probe.record.task_rows import TaskRows

SCHEMA_VERSION = 1

#: A norm that was not there to be measured (a parameter without gradient). Norms are never
#: negative, so it cannot be mistaken for a measurement, and it is not NaN, which is a finding.
MISSING = -1.0

#: Phases of a row. A support row is an inner step; a query row is everything between a task's last
#: inner step and its end; an outer row is one step of the outer (meta) optimizer.
PHASES = ("support", "query", "outer")
SUPPORT, QUERY, OUTER = range(3)

#: One number a row.
SCALAR_COLUMNS: dict[str, str] = {
    "task": "task index within the run, from 0",
    "step": "inner step within the task, from 0; for a query row, the steps taken before it",
    "phase": "0 support, 1 query, 2 outer",
    "layout": "index into meta.json's layouts: the names behind the list columns",
    "site": "index into meta.json's sites: the user's line; -1 unknown",
    "seconds": "since the probe was attached",
    "loss": "the loss whose gradient was taken; nan where not seen (see loss_seen)",
    "loss_seen": "1 where a loss was seen",
    "learning_rate": "largest over parameter groups; -inf where unknown",
    "instability": "step size x curvature of the step before, from two gradients; nan unknown",
    "carried_gradient": "norm of the .grad that was already there before the step's own backward",
    "query_gradient": "norm of the gradient of a query of weights adapted in place; nan unknown",
    "carried_velocity": "for a task's first step by hand: cosine of what the update holds besides "
    "the gradient with the last update of the task before; 1 is its momentum, nan unknown",
    "flags": "bit set, see FLAGS",
}

#: One number a parameter a row.
PARAMETER_COLUMNS: dict[str, str] = {
    "norm_before": "Frobenius norm before the step",
    "norm_after": "Frobenius norm after the step",
    "update_norm": "Frobenius norm of after - before",
    "gradient_norm": "Frobenius norm of the gradient that was applied; -1 where there was none",
    "step_rate": "-(update . gradient) / |gradient|^2: the learning rate of plain descent; nan "
    "unknown",
}

#: One number a normalisation layer a row; -1 (or nan for distances) where it was not called.
BATCH_NORM_COLUMNS: dict[str, str] = {
    "bn_training": "1 batch statistics, 0 running statistics, -1 not called, 2 both in one row",
    "bn_calls": "forward calls since the last gradient",
    "bn_batches": "num_batches_tracked of the buffers used; -1 unknown",
    "bn_values": "values each channel is normalised over, the fewest; -1 unknown",
    "bn_mean_distance": "RMS over channels of (running - batch mean) / batch deviation",
    "bn_log_variance_ratio": "mean over channels of ln(running / batch variance)",
    "bn_drift": "RMS over channels of the move of the running mean / batch deviation",
    "bn_running_mean_before": "Frobenius norm of the running mean before the forward",
    "bn_running_mean_after": "the same after",
    "bn_running_var_before": "mean of the running variance before the forward",
    "bn_running_var_after": "the same after",
    "bn_input_finite": "1 where the layer's batch statistics were finite, 0 not, -1 unknown",
    "bn_untrained": "1 where the running statistics are still exactly mean 0, variance 1",
    "bn_shared": "1 where the buffers are the base model's own, 0 where they are copies, -1 none",
}

#: Meanings of the bits in ``flags``: the gradient carried a graph; which tensor was the updated one
#: is a guess; the weights after the step were not seen; a clip changed the gradient; several
#: backwards led to one step; a clip was applied, active or not; the update was thrown away; an
#: update was seen, was not zero, and changed no weight; an update was seen and was exactly zero; a
#: matrix or a net stood between gradient and update.
FLAGS = {
    "second_order": 1,
    "uncertain": 2,
    "incomplete": 4,
    "clipped": 16,
    "accumulated": 32,
    "clippable": 128,
    "discarded": 256,
    "rounded": 512,
    "zero": 1024,
    "transformed": 2048,
}

#: Modules that hold parameters without being a layer.
CONTAINERS = frozenset({"ParameterList", "ParameterDict"})
#: How the name of a parameter begins that no module owns; its index and its shape follow.
NAMELESS = "param["

Array = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class ParameterInfo:
    """One parameter tensor of a layout.

    Attributes:
        name: dotted name in the user's model.
        shape: its shape.
        dtype: such as ``"float32"``.
        device: such as ``"cpu"``.
        kind: class of the module that owns it, such as ``"Conv2d"``; empty where unknown.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    device: str
    kind: str = ""

    @property
    def layer(self) -> str:
        """Dotted name of the module it belongs to; its own name where a mere list holds it."""
        if self.kind in CONTAINERS:
            return self.name
        return self.name.rpartition(".")[0] or self.name


@dataclass
class Layout:
    """The names behind the list columns of rows that belong to one model.

    Attributes:
        index: position in ``meta.json``'s ``layouts``.
        model: class name of the model, or ``""``.
        parameters: in the model's own order.
        batch_norms: names of normalisation layers, in the order they were first called.
        dropouts: names of dropout layers, likewise.
    """

    index: int
    model: str
    parameters: tuple[ParameterInfo, ...]
    batch_norms: list[str] = field(default_factory=list)
    dropouts: list[str] = field(default_factory=list)

    def spoken(self, layer: str) -> str:
        """A layer's name for a sentence: ``layer 1 (BatchNorm2d)`` where it is but a number."""
        if not layer.replace(".", "").isdigit():
            return layer
        owned = (p.kind for p in self.parameters if p.layer == layer and p.kind)
        kind = next(owned, "")
        return f"layer {layer} ({kind})" if kind else f"layer {layer}"

    def to_json(self) -> dict[str, Any]:
        """Plain data for ``meta.json``."""
        return {
            "model": self.model,
            "parameters": [
                {
                    "name": p.name,
                    "shape": list(p.shape),
                    "dtype": p.dtype,
                    "device": p.device,
                    "kind": p.kind,
                }
                for p in self.parameters
            ],
            "batch_norms": list(self.batch_norms),
            "dropouts": list(self.dropouts),
        }

    @classmethod
    def from_json(cls, index: int, data: dict[str, Any]) -> Layout:
        """The inverse of :meth:`to_json`."""
        parameters = tuple(
            ParameterInfo(p["name"], tuple(p["shape"]), p["dtype"], p["device"], p["kind"])
            for p in data["parameters"]
        )
        return cls(
            index, data["model"], parameters, list(data["batch_norms"]), list(data["dropouts"])
        )


@dataclass(frozen=True)
class Event:
    """Something that happened once: a task began, a mode was switched, the outer optimizer stepped.

    Attributes:
        kind: what happened, such as ``"task-start"``.
        task: task index, or -1.
        step: inner step, or -1.
        seconds: since the probe was attached.
        site: ``path:line`` in the user's code, or None.
        data: plain values that belong to it.
    """

    kind: str
    task: int = -1
    step: int = -1
    seconds: float = 0.0
    site: str | None = None
    data: dict[str, Any] = field(default_factory=dict)


#: Normalisation columns that may be negative: nan, not -1, is their 'unknown'.
BATCH_NORM_DISTANCES = ("bn_mean_distance", "bn_log_variance_ratio", "bn_drift")


@dataclass
class Block:
    """Consecutive rows of one layout, as arrays ``[S]``, ``[S, P]`` and ``[S, B]``.

    ``S`` rows, ``P`` parameters, ``B`` normalisation layers. ``events`` are those that happened
    since the block before, in order; ``sites`` resolves the ``site`` column.
    """

    layout: Layout
    scalars: dict[str, Array]
    parameters: dict[str, Array]
    batch_norm: dict[str, Array]
    dropout: Array
    events: list[Event] = field(default_factory=list)
    sites: list[str] = field(default_factory=list)
    rank: int = 0

    def __len__(self) -> int:
        return len(self.scalars["task"])

    @cached_property
    def by_task(self) -> TaskRows:
        """The rows by task."""
        return TaskRows(self.scalars["task"])

    def events_of(self, kind: str) -> Sequence[Event]:
        """Events of one kind, in order."""
        return self._events_by_kind.get(kind, ())

    @cached_property
    def _events_by_kind(self) -> dict[str, list[Event]]:
        kinds: dict[str, list[Event]] = {}
        for event in self.events:
            kinds.setdefault(event.kind, []).append(event)
        return kinds

    @cached_property
    def ended(self) -> set[int]:
        """Tasks of ``task-end`` events; one of several tasks in one (``vmap``) names the first."""
        return {event.task for event in self.events_of("task-end")}

    def site(self, row: int) -> str | None:
        """The user's line of a row, or None."""
        number = int(self.scalars["site"][row])
        return self.sites[number] if 0 <= number < len(self.sites) else None


def empty_block(layout: Layout, sites: list[str], events: list[Event], rank: int = 0) -> Block:
    """A block of events only."""
    nothing = np.empty(0)
    return Block(
        layout,
        dict.fromkeys(SCALAR_COLUMNS, nothing),
        {name: np.empty((0, len(layout.parameters))) for name in PARAMETER_COLUMNS},
        {name: np.empty((0, len(layout.batch_norms))) for name in BATCH_NORM_COLUMNS},
        np.full((0, len(layout.dropouts)), MISSING),
        events,
        sites,
        rank,
    )


def joined(parts: Sequence[Block], events: list[Event]) -> Block:
    """One block of the rows of several of the same layout, with ``events``.

    Normalisation and dropout layers met later are unknown to the earlier parts.
    """
    last = parts[-1]
    scalars = {n: np.concatenate([part.scalars[n] for part in parts]) for n in last.scalars}
    parameters = {n: np.concatenate([p.parameters[n] for p in parts]) for n in last.parameters}
    batch_norm = {n: _stacked([part.batch_norm[n] for part in parts], n) for n in last.batch_norm}
    dropout = _stacked([part.dropout for part in parts])
    return Block(
        last.layout, scalars, parameters, batch_norm, dropout, events, last.sites, last.rank
    )


def _stacked(values: Sequence[Array], name: str = "") -> Array:
    """``[S, B]`` arrays below one another, narrower ones filled up with 'unknown'."""
    width = values[-1].shape[1]
    unknown = np.nan if name in BATCH_NORM_DISTANCES else MISSING
    return np.concatenate(
        [
            np.pad(v, ((0, 0), (0, width - v.shape[1])), constant_values=unknown)
            if v.shape[1] < width
            else v
            for v in values
        ]
    )
