"""Outer steps that no gradient takes: the base is moved towards what its tasks came to.

Reptile (Nichol et al., On first-order meta-learning algorithms, 2018, algorithm 1) without an outer
optimizer writes ``w + epsilon * (adapted - w)`` into the base: with ``+=``, ``lerp_`` or
``load_state_dict``, there is nothing to follow. What is seen is where the next task begins: between
where the last ones began and an average of where they came to (a weighted one, in federated
averaging). Nothing else leads there but a step that was computed from them.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from divergence_probe.observe.at_hand import is_at_hand, worth_a_wait
from divergence_probe.observe.models import KnownModel
from divergence_probe.observe.nesting import STEPS_A_RUN
from divergence_probe.observe.session import Session
from divergence_probe.observe.snapshot import (
    MOST_TOGETHER,
    Snapshot,
    Values,
    are_whole,
    elements_of,
    gathered,
    snapshot,
    spread,
)
from divergence_probe.observe.task import Task
from divergence_probe.observe.tensors import are_plain
from divergence_probe.record.schema import FLAGS

# A sum, two products and a difference are each rounded to half a unit of the larger number.
_ROUNDINGS = 4
# A move must be so many times what rounding alone could be, or any direction would do.
_CLEAR = 100
# With as many ways as elements every point is among them, and with nearly as many almost.
_MORE_ELEMENTS = 2
# How far shares may be from what they are in theory, where the ways are much alike.
_NEARLY = 0.01
# Ways that are kept one by one, so that their average may be weighted; and elements of all of them.
_MOST_WAYS, _MOST_KEPT = 16, 2**22


@dataclass
class _Base:
    """Where tasks began last, and where those that did came to.

    Attributes:
        positions: which of the model's parameters they moved.
        start: values of these.
        task: the latest of the tasks; None before it began.
        ways: what the earlier ones moved their weights by, as :func:`_flat` has it.
        tasks: how many these are; where there are more than ways, the last is of several.
        provisional: those that may turn out to be ordinary training.
    """

    positions: list[int]
    start: Sequence[Tensor]
    task: Task | None = None
    ways: list[list[Tensor]] = field(default_factory=list)
    tasks: int = 0
    provisional: list[Task] = field(default_factory=list)

    def add_latest(self) -> bool:
        """Count in what the latest task came to; False where that is not known."""
        task = self.task
        adapted = task.adapted if task is not None else None
        ends = gathered(adapted, self.positions) if adapted is not None else None
        if ends is None or not are_whole(ends) or not _comparable(ends, self.start):
            return False
        if task is not None and task.provisional:
            self.provisional.append(task)
        way = _difference(ends, self.start)
        if len(self.ways) < min(_MOST_WAYS, _MOST_KEPT // max(elements_of(ends), 1)):
            self.ways.append(way)
        elif self.ways:  # of the rest only the mean is told
            self.ways[-1] = [a + b for a, b in zip(self.ways[-1], way, strict=True)]
        else:
            self.ways = [way]
        self.tasks, self.task = self.tasks + 1, None
        return True

    def led_to(self, values: Sequence[Tensor]) -> bool:
        """Whether ``values`` lie among the start and what the tasks came to."""
        if elements_of(values) < len(self.ways) + _MORE_ELEMENTS:
            return False
        move = _difference(values, self.start)
        rounding = max(torch.finfo(value.dtype).eps for value in _flat(values)) * (
            _norm(_flat(self.start)) + _norm(_flat(values))
        )
        if not _norm(move) > _CLEAR * rounding:
            return False  # (also where it is not finite)
        shares = self._shares(move)
        if min(shares) < -_NEARLY or not 0 < sum(shares) <= 1 + _NEARLY:
            return False
        rest = move
        for share, way in zip(shares, self.ways, strict=True):
            rest = [a - share * b for a, b in zip(rest, way, strict=True)]
        # The whole way of the latest: the base was left where that task came to.
        apart = [a - b for a, b in zip(move, self.ways[-1], strict=True)]
        left = len(self.ways) == self.tasks and _norm(apart) <= _ROUNDINGS * rounding
        return not left and _norm(rest) <= _ROUNDINGS * rounding

    def _shares(self, move: Sequence[Tensor]) -> list[float]:
        """How much of each way, by least squares, makes up a move; alike where they are alike."""
        products = [[_dot(a, b) for b in self.ways] for a in self.ways]
        gram = torch.tensor(products, dtype=torch.float64)
        along = torch.tensor([_dot(way, move) for way in self.ways], dtype=torch.float64)
        if not (gram.isfinite().all() and along.isfinite().all()):
            return [0.0]
        shares: list[float] = (torch.linalg.pinv(gram, rtol=1e-12) @ along).tolist()
        return shares


class Reptile:
    """Tells outer steps by where tasks begin."""

    def __init__(self, session: Session) -> None:
        self._session = session
        session.loaded.append(self.loaded)
        self._bases: weakref.WeakKeyDictionary[KnownModel, _Base] = weakref.WeakKeyDictionary()
        self._stepped: weakref.WeakSet[KnownModel] = weakref.WeakSet()
        self._waiting: weakref.WeakKeyDictionary[KnownModel, tuple[_Base, Sequence[Tensor]]] = (
            weakref.WeakKeyDictionary()
        )

    def stepped(self, known: KnownModel, always: bool = True) -> None:
        """Another outer step of a base was seen; and that is ``always`` what moves it."""
        self._bases.pop(known, None)
        if always:
            self._stepped.add(known)

    def begins(self, known: KnownModel, positions: list[int], values: Values) -> None:
        """A task is about to begin on a base with ``values`` at ``positions``.

        (Before it is open: an outer step ends what is.)
        """
        if known in self._stepped:
            return
        base = self._bases.get(known)
        if not are_whole(values) or not _are_at_hand(values):
            self._bases.pop(known, None)
            return
        if base is not None and base.positions == positions and base.add_latest():
            if _equal(base.start, values):
                return
            self._step_if_led(known, base, values)
        self._bases[known] = _Base(positions, values)

    def began(self, task: Task) -> None:
        """The task that was about to begin did."""
        base = self._bases.get(task.known)
        if base is not None:
            base.task = task

    def loaded(self, module: nn.Module) -> None:
        """A module has loaded a state: the base may be gone by the time its next task would begin.

        (Put back where its tasks began, it waits for the next one of them.)
        """
        for known, base in list(self._bases.items()):
            if known.model is not None and known.model() is module:
                values = _moved_to(known, base)
                if values is not None:
                    self.begins(known, base.positions, values)

    def close(self) -> None:
        """The run is over: the last step is seen by what the base is now."""
        for known, base in list(self._bases.items()):
            values = _moved_to(known, base)
            if values is not None and base.add_latest():
                self._step_if_led(known, base, values)

    def _step_if_led(self, known: KnownModel, base: _Base, values: Sequence[Tensor]) -> None:
        """Record the step that led to ``values``, if one did.

        One training that was moved back once, half the way (as fine-tuned weights are averaged with
        those before), is no inner loop: that takes two such moves, or a copy that was trained.
        """
        waiting = self._waiting.pop(known, None)
        if not _comparable(base.start, values) or not base.led_to(values):
            return
        ordinary = [task for task in base.provisional if task.provisional and task.base is None]
        if any(task.steps < STEPS_A_RUN for task in ordinary):
            return
        if ordinary:
            if waiting is None:
                self._waiting[known] = base, values
                return
            if all(task.provisional for task in waiting[0].provisional):
                self._record(known, *waiting)
        self._record(known, base, values)

    def _record(self, known: KnownModel, base: _Base, values: Sequence[Tensor]) -> None:
        for task in base.provisional:
            if task.base is None:
                task.data["moved_on"] = True  # nothing starts over: what else goes on may, too
            self._session.confirm(task)
        width = len(known.layout.parameters)
        self._session.outer_step(
            known,
            spread(base.start, base.positions, width),
            spread(values, base.positions, width),
            [None] * width,
            learning_rate=None,
            site=-1,
            flags=FLAGS["incomplete"],
            optimizer="",
        )


def _moved_to(known: KnownModel, base: _Base) -> Sequence[Tensor] | None:
    """Where a base is now; None where its tasks began there, or where that cannot be told."""
    now = [known.parameters[position]() for position in base.positions]
    if not are_whole(now) or not _are_at_hand(now):
        return None
    values = snapshot(now, copy=True)
    return values if are_whole(values) and not _equal(base.start, values) else None


def _are_at_hand(values: Sequence[Tensor]) -> bool:
    """Whether values can be computed with, and looked at without waiting for a device."""
    if isinstance(values, Snapshot):
        return is_at_hand(values.store, worth_a_wait)
    return (
        bool(values)
        and are_plain(values)
        and all(is_at_hand(value, worth_a_wait) for value in values)
    )


def _flat(values: Sequence[Tensor]) -> list[Tensor]:
    """One vector of all that is small, or one for each parameter.

    Equally for equal shapes, however they are kept: what tasks adapt of a model may have been
    copied together, and where they came to be a part of more.
    """
    if elements_of(values) > MOST_TOGETHER:
        return [value.reshape(-1) for value in values]
    if isinstance(values, Snapshot):
        return [values.vector]
    return [torch.cat([value.reshape(-1) for value in values])]


def _difference(left: Sequence[Tensor], right: Sequence[Tensor]) -> list[Tensor]:
    return [a - b for a, b in zip(_flat(left), _flat(right), strict=True)]


def _comparable(left: Values, right: Values) -> bool:
    if isinstance(left, Snapshot) and isinstance(right, Snapshot):
        return left.shapes == right.shapes and left.store.device == right.store.device
    return len(left) == len(right) and all(
        a is not None and b is not None and a.shape == b.shape and a.device == b.device
        for a, b in zip(left, right, strict=True)
    )


def _equal(left: Sequence[Tensor], right: Sequence[Tensor]) -> bool:
    return _comparable(left, right) and all(map(torch.equal, _flat(left), _flat(right)))


def _norm(vectors: Sequence[Tensor]) -> float:
    return math.sqrt(_dot(vectors, vectors))


def _dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """The inner product over all parameters, in double precision."""
    return sum(float(torch.dot(a.double(), b.double())) for a, b in zip(left, right, strict=True))
