"""What an optimizer's parameters are: a base, copies of one, or weights adapted in place."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from divergence_probe.observe.at_hand import mark_of
from divergence_probe.observe.in_place_tasks import InPlaceTasks
from divergence_probe.observe.loop_tasks import LoopTasks
from divergence_probe.observe.models import KnownModel, base_among
from divergence_probe.observe.naming import named
from divergence_probe.observe.pending import Pending
from divergence_probe.observe.session import Session
from divergence_probe.observe.task import Task


@dataclass(frozen=True, slots=True)
class Target:
    """What a step moves.

    Attributes:
        parameters: those of the optimizer's that are of the model.
        known: the model that names them.
        positions: theirs in it.
        base: the model they are copies of, if they are.
        outer: whether to move them is an outer step.
    """

    parameters: list[Tensor]
    known: KnownModel
    positions: list[int]
    base: KnownModel | None
    outer: bool


class Targets:
    """Tells bases from their copies, and outer optimizers from inner ones."""

    def __init__(self, session: Session, tasks: InPlaceTasks, loop_tasks: LoopTasks) -> None:
        self._session = session
        self._tasks = tasks
        self._loop_tasks = loop_tasks
        self._in_turn = loop_tasks.in_turn
        self._through: weakref.WeakSet[Any] = weakref.WeakSet()
        self._moved: weakref.WeakSet[KnownModel] = weakref.WeakSet()

    def of(self, optimizer: Any, parameters: list[Tensor], pending: Pending | None) -> Target:
        """What an optimizer is about to move.

        Args:
            optimizer: which.
            parameters: all of its own.
            pending: the gradient it acts on, None where that was handed to it.
        """
        moved = self._base_of(parameters)
        if moved is None:
            return self._identify(optimizer, parameters, pending)
        if self._trains(optimizer, moved[0], pending):
            return self._identify(optimizer, parameters, pending, trains=True)
        known, places = moved
        handed = pending is None or not pending.reached(parameters)
        if handed and optimizer not in self._tasks.of:
            self._in_turn.note_outer(optimizer, known)
        own = [parameters[index] for index in places]
        return Target(own, known, list(places.values()), None, outer=True)

    def moved(self, known: KnownModel) -> None:
        """A base was moved, or what may be one: what begins equal to it from now on is its copy."""
        self._moved.add(known)

    def is_around(self, optimizer: Any) -> bool:
        """Whether an optimizer moves what is around the weights that tasks adapt."""
        return optimizer in self._through

    def _base_of(self, parameters: list[Tensor]) -> tuple[KnownModel, dict[int, int]] | None:
        """The base most of ``parameters`` belong to; and of those that do, their places in it."""
        whole = self._session.models.find_all(parameters)
        if whole is not None and whole[0] in self._session.bases:
            return whole[0], dict(enumerate(whole[1]))
        return base_among(self._session.bases, parameters)

    def _trains(self, optimizer: Any, known: KnownModel, pending: Pending | None) -> bool:
        """Whether a base is adapted in place (or just trained), though its tasks are copies.

        It is stepped by a gradient of its own weights, as it is in an outer step (DARTS, say). But
        it was adapted in place before, or steps again and no task began in between. A base that
        tasks were differentiated back to has an outer optimizer: then another one does that.
        """
        session = self._session
        if pending is None or self._in_turn.was_outer(optimizer, known):
            return False
        if known in session.unrolled and (
            not session.outer_optimizers or optimizer in session.outer_optimizers
        ):
            return False
        if known not in self._tasks.adapted and known not in session.just_stepped:
            return False
        return pending.reached(t for r in known.parameters if (t := r()) is not None)

    def _identify(
        self,
        optimizer: Any,
        parameters: list[Tensor],
        pending: Pending | None,
        trains: bool = False,
    ) -> Target:
        """What parameters are that no base is known to have, or that one adapts (``trains``)."""
        session = self._session
        if not trains and any(map(session.models.begun, parameters)):
            known, positions = self._named(parameters, pending)
            return Target(parameters, known, positions, None, outer=True)
        if self._goes_through_tasks(optimizer, parameters, pending):
            known, positions = self._named(parameters, pending)
            return Target(parameters, known, positions, None, outer=True)
        others = self.adapted_by_others(optimizer, parameters)
        adapts = optimizer in self._tasks.of
        if others is not None and self._in_turn.is_outer(
            optimizer, others, parameters, pending, adapts
        ):
            return Target(parameters, others.known, others.positions, None, outer=True)
        task = self._tasks.of.get(optimizer)
        goes_on = task is not None and not task.ended and task.adapts(parameters)
        if task is not None and goes_on and not self._took_over(task, parameters):
            # (clones that were named by value have other values by now)
            return Target(parameters, task.known, task.positions, task.base, outer=False)
        origins = self._origins_of(parameters)
        copied = self._owner_of(origins, pending) if origins else None
        if copied is not None and len(origins) == len(parameters):
            known, positions = copied
            return Target(parameters, known, positions, known, outer=False)
        equal = self._equal_to_base(parameters)
        known, positions = equal or self._named(parameters, pending)
        base = known if equal else copied[0] if copied is not None else None
        trains = trains or self._trains(optimizer, known, pending)
        moves_base = known in session.bases and not trains
        by_optimizer = any(t.known is known and t.base is None for t in self._tasks.latest)
        moves_base |= known in session.adapted_by_hand and not by_optimizer
        if pending is None and base is None and any(p.grad is not None for p in parameters):
            self.moved(known)  # by gradients that were handed to it: those of its copies, maybe
        return Target(parameters, known, positions, base, outer=base is None and moves_base)

    def _named(
        self, parameters: list[Tensor], pending: Pending | None
    ) -> tuple[KnownModel, list[int]]:
        """The model of an optimizer's parameters, and their positions in it.

        Where only shapes tell, they are not the weights that tasks adapt if the loss of these
        depends on both: a penalty for each weight has the shape of the weights. Nor if those live
        on, are adapted themselves, and the gradient was put there by hand, as a hypergradient is.
        """
        models = self._session.models
        known, positions = named(models, parameters, parameters)
        by_hand = pending is None and any(p.grad is not None for p in parameters)
        if models.are_beside(known, parameters) or (
            by_hand and self._are_others(known, parameters)
        ):
            known = models.beside(known, parameters)
        return known, positions

    def _are_others(self, known: KnownModel, parameters: list[Tensor]) -> bool:
        """Whether nameless weights are adapted in place that merely have these shapes."""
        if known.model is not None or any(known.position(p) is not None for p in parameters):
            return False
        adapted = any(t.known is known and t.base is None for t in self._tasks.latest)
        return adapted and all(reference() is not None for reference in known.parameters)

    def _goes_through_tasks(
        self, optimizer: Any, parameters: list[Tensor], pending: Pending | None
    ) -> bool:
        """Whether an optimizer's gradient comes through what tasks made, whatever it moves.

        (Learned rates, a network around the weights that adapt, a learned optimizer.) Its leaves
        are looked for the first time only: it is an outer optimizer then, for good. A gradient that
        was put there by hand may be a sum of several such, of each of its tasks.
        """
        if pending is None and self._loop_tasks.awaits_step(parameters):
            self._through.add(optimizer)
        if pending is not None and pending.through_task:
            pending.through = False  # this is the step it led to
            self._through.add(optimizer)
        return optimizer in self._through

    def adapted_by_others(self, optimizer: Any, parameters: list[Tensor]) -> Task | None:
        """The latest task in which another optimizer adapted these very weights, in this order."""
        for task in reversed(self._tasks.latest):
            own = task.optimizer is not None and task.optimizer() is optimizer
            if task.base is None and not own and task.adapts(parameters):
                return task
        return None

    def _origins_of(self, parameters: list[Tensor]) -> list[Tensor]:
        """What most of these parameters were copied from; others are a task's own.

        (A head that is made of its task's prototypes, say, and adapted together with a copy.)
        """
        models = self._session.models
        origins = [origin for p in parameters if (origin := models.origin_of(p)) is not None]
        return origins if 2 * len(origins) > len(parameters) else []

    def _owner_of(
        self, origins: list[Tensor], pending: Pending | None
    ) -> tuple[KnownModel, list[int]] | None:
        """The model that has all of ``origins``, and their positions in it.

        Of several optimizers each has a part of it: the model is what the backward went through.
        """
        models = self._session.models
        if models.find(origins[0]) is None:
            reached = [t for r in pending.inputs if (t := r()) is not None] if pending else []
            whole = [origin for t in reached if (origin := models.origin_of(t)) is not None]
            models.discover([*origins, *whole])
            if models.find(origins[0]) is None:
                models.discover(origins)
        return models.find_all(origins)

    def _took_over(self, task: Task, parameters: list[Tensor]) -> bool:
        """Whether what a task adapted has been given the values of a base since its last step."""
        if task.base is not None or not self._moved:  # (asked at every step)
            return False
        written = any(
            task.marks.get(place) != mark_of(parameter)
            for parameter, place in zip(parameters, task.positions, strict=False)
        )
        return written and self._equal_to_base(parameters) is not None

    def _equal_to_base(self, parameters: list[Tensor]) -> tuple[KnownModel, list[int]] | None:
        """The base that parameters begin equal to, value by value: then they are its copies.

        Asked only of what an outer step has moved, or gradients that were handed to it: before
        that, either may be the other's copy.
        """
        matched = self._session.models.match(parameters, self._moved)
        if matched is None:
            return None
        known, positions = matched
        origins = [known.parameters[position]() for position in positions]
        pairs = list(zip(parameters, origins, strict=True))
        if any(parameter is origin for parameter, origin in pairs):
            return None  # the base itself
        for parameter, origin in pairs:
            if origin is not None:
                self._session.models.note_copy(parameter, origin)
        for task in self._tasks.latest:
            if task.base is None and task.adapts(parameters):
                self._session.confirm(task)  # so were they in the tasks before
        return matched
