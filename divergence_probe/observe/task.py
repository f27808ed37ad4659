"""One inner loop as it is observed: what is known of it while it goes on."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from divergence_probe.observe.at_hand import Mark
from divergence_probe.observe.capture import Forwards, Row
from divergence_probe.observe.models import KnownModel
from divergence_probe.observe.pending import Learned
from divergence_probe.observe.retention import Watched
from divergence_probe.observe.snapshot import Values


@dataclass(eq=False)
class Task:
    """One inner loop: from the base's weights to the adapted ones.

    Attributes:
        index: of the run; a vmapped task stands for ``width`` consecutive indices.
        known: the user's model.
        adapter: how it is seen.
        site: number of the user's line where it began.
        width: number of tasks batched by vmap.
        steps: inner steps taken so far.
        forwards: what ran forward on its own modules since its last gradient.
        module_names: names of the modules of its fast model, by identity.
        last: the row of its last step.
        fast: weak references to its current fast weights.
        began: weak references to the leaves of its own that it started from, if it did.
        origins: weak references to the leaves it began from.
        base: the model whose weights it started from, where those are other tensors.
        positions: which of the model's parameters its loop moves, in the loop's order.
        inputs: weak references to what its next gradient is expected to be taken of.
        in_place: whether its updates overwrite the parameters.
        marks: by position, the parameters' marks after the last update.
        counts: the step that made new fast weights, and their counts of in-place changes when it
            was settled, in the order of ``inputs``; None for those it left as they were.
        looked_at: whether a gradient that was no step's was taken since.
        overwritten: whether its fast weights were written anew in place: it is over.
        made_by: one past the number of the autograd node that made the last of its weights; kept
            only where no model owns them. -1 unknown, or none did.
        optimizer: what takes its steps in place; None by hand, or by a library.
        learned: what is known of the line its gradients are taken at.
        provisional: whether it may still turn out to be ordinary training; then rows are held.
        held: rows of a provisional task.
        doubtful: whether its only step may be undone before the real one is taken.
        put_back: whether its weights were put back after its query, though it is not over yet.
        anchored: whether a step of it was written with a value that was made without the parameter
            itself: so may later ones be.
        first: the row of its first step.
        came_to: values its weights ended with, once it is over.
        graph: of its query, where a backward was told to leave it whole.
        own_statistics: running means, by identity, that were loaded for it.
        recomputed: normalisation layers seen running again inside a gradient call.
        data: facts for its events.
    """

    index: int
    known: KnownModel
    adapter: str
    site: int
    width: int = 1
    steps: int = 0
    forwards: Forwards = field(default_factory=Forwards)
    module_names: dict[int, str] | None = None
    last: Row | None = None
    fast: list[weakref.ref[Tensor] | None] = field(default_factory=list)
    began: list[weakref.ref[Tensor]] = field(default_factory=list)
    origins: list[weakref.ref[Tensor]] = field(default_factory=list)
    base: KnownModel | None = None
    positions: list[int] = field(default_factory=list)
    inputs: list[weakref.ref[Tensor] | None] = field(default_factory=list)
    in_place: bool = False
    marks: dict[int, Mark] = field(default_factory=dict)
    counts: tuple[int, list[int | None]] = (0, [])
    looked_at: bool = False
    overwritten: bool = False
    made_by: int = -1
    optimizer: weakref.ref[Any] | None = None
    learned: Learned | None = None
    provisional: bool = False
    held: list[Row] = field(default_factory=list)
    doubtful: bool = False
    put_back: bool = False
    anchored: bool = False
    first: Row | None = None
    came_to: Values | None = None
    graph: weakref.ref[Watched] | None = None
    own_statistics: set[int] = field(default_factory=set)
    recomputed: set[str | None] = field(default_factory=set)
    data: dict[str, Any] = field(default_factory=dict)
    ended: bool = False
    thread: int = field(default_factory=threading.get_ident)

    def places(self) -> dict[int, int]:
        """Positions of its current fast weights, by identity."""
        alive = ((r() if r is not None else None, place) for place, r in enumerate(self.fast))
        return {id(tensor): place for tensor, place in alive if tensor is not None}

    def left_behind(self, weight: Tensor, owner: KnownModel, place: int) -> bool:
        """Whether ``weight`` is its model's, or a like one's, and it runs with another instead.

        Args:
            weight: a parameter.
            owner: the model that owns it.
            place: its position there.
        """
        if owner.layout is not self.known.layout or place not in self.positions:
            return False
        adapted = self.fast[place] if place < len(self.fast) else None
        # (a step that made new tensors did so whether they were seen or not)
        return adapted() is not weight if adapted is not None else not self.in_place

    def adapts(self, parameters: Sequence[Tensor]) -> bool:
        """Whether ``parameters`` are the very ones it adapts, in its order."""
        fast = [self.fast[place] for place in self.positions] if self.fast else []
        return len(fast) == len(parameters) and all(
            reference is not None and reference() is parameter
            for reference, parameter in zip(fast, parameters, strict=True)
        )

    @property
    def adapted(self) -> Values | None:
        """Values of its weights after its last step; None before it took one."""
        return self.last.after if self.last is not None else self.came_to


class ThreadForwards(threading.local):
    """What ran forward on this thread and belongs to no task yet."""

    def __init__(self) -> None:
        self.forwards = Forwards()
