"""A gradient that was taken, what its update may turn out to be, and what its line has taught."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from divergence_probe.observe.at_hand import Mark, is_number_at_hand, mark_of
from divergence_probe.observe.capture import Forwards, Number
from divergence_probe.observe.models import KnownModel
from divergence_probe.observe.recital import Heard, Recital, Script
from divergence_probe.observe.snapshot import shapes_of
from divergence_probe.observe.tensors import physical

if TYPE_CHECKING:
    from divergence_probe.observe.in_turn import Point
    from divergence_probe.observe.retention import Watched
    from divergence_probe.observe.task import Task

# How often what was learned at a line must have been right to be relied on without more evidence.
_TRUSTED = 3
# An update that is another one every few tasks is followed every time.
_MOST_SCRIPTS = 8
# How far an update may lie behind its parameter: what is farther is another step's.
_MOST_LEVELS, _MOST_NODES = 5, 16


#: Tasks that may take their steps in turn.
MOST_IN_TURN = 64
#: Of each parameter what it may have become.
Made = list[list[weakref.ref[Tensor]]]


@dataclass
class Learned:
    """What was found out about the loop at one gradient line.

    Attributes:
        candidates: for each parameter, which of its candidates was the updated one.
        writes: for each parameter, how many in-place writes complete its update.
        steps: steps the last task took, where two in a row agreed; None unknown.
        previous_steps: steps of the task before.
        optimizer: parameters of the optimizer that takes the step, so that there is nothing to
            follow; None where none does.
        functional: whether updates make new tensors.
        piecewise: whether each parameter's gradient is a call by itself.
        confirmed: how often what was learned turned out right.
        counts: how often what an update made was written to in place before the next gradient.
        script: the operations of the update, once they were the same for a while.
        made: how many autograd nodes after its gradient an update's last one comes, and its kind.
        scripts: how many scripts were tried to learn.
        flags: ``schema.FLAGS`` that hold of every step here.
        disturbs: whether weights were put back before the step here, as they were only disturbed.
        discards: whether an update was thrown away here: each is followed to its first use.
        rebinds: whether parameters were given the memory of their update here.
        unmaps: whether gradients of many tasks leave the vmap here, and the update is made outside.
        in_turn: whether tasks take their steps in turn here, so that one goes on after another.
        unused: what became of each parameter, if the next gradient was taken at the same point.
        unclaimed: the same of the latest that were taken for no update, as nothing used them.
    """

    candidates: list[int] | None = None
    writes: list[int] | None = None
    steps: int | None = None
    previous_steps: int | None = None
    optimizer: list[weakref.ref[Tensor]] | None = None
    functional: bool | None = None
    piecewise: bool = False
    confirmed: int = 0
    counts: list[int | None] = field(default_factory=list)
    script: Script | None = None
    made: tuple[int, type] | None = None
    scripts: int = 0
    flags: int = 0
    disturbs: bool = False
    discards: bool = False
    rebinds: bool = False
    unmaps: bool = False
    in_turn: bool = False
    unused: Made = field(default_factory=list)
    unclaimed: list[Made] = field(default_factory=list)

    def claims(self, tensors: Sequence[Tensor]) -> bool:
        """Whether ``tensors`` are what became of the parameters once, though not used at once."""
        return any(
            len(made) == len(tensors)
            and all(
                any(reference() is tensor for reference in options)
                for tensor, options in zip(tensors, made, strict=True)
            )
            for made in self.unclaimed
        )

    @property
    def is_known_by_heart(self) -> bool:
        """Whether tasks here make new tensors in a known number of steps, all at once each."""
        return bool(
            self.steps
            and self.functional
            and self.confirmed > 1
            and self.optimizer is None
            and not self.piecewise
            and not self.discards
            and not self.in_turn
        )

    def task_took(self, steps: int) -> None:
        """Note a finished task's length; it is trusted once two in a row agree."""
        self.steps = steps if steps == self.previous_steps else None
        self.previous_steps = steps


@dataclass(slots=True)
class Candidate:
    """What may be a parameter's updated tensor: the user's, weakly, and its value.

    ``cut`` where the gradient in it was detached: then it is first order whatever the graph was.
    ``place`` is the address of its memory where the value is a copy.
    """

    tensor: weakref.ref[Tensor]
    value: Tensor
    cut: bool = False
    place: int = 0


@dataclass(slots=True)
class Pending:
    """A gradient that was taken and whose update, if one follows, is not complete yet.

    Tensors of the user's are held weakly: a pending gradient must not keep a graph alive.
    ``before`` and ``gradients`` are detached (or cloned where the user may overwrite them).

    Attributes:
        site: number of the line the gradient was taken at.
        function: ``"grad"``, ``"backward"`` or ``"func"``.
        inputs: what the gradient was taken of.
        before: their values.
        gradients: the gradients, None where there is none.
        loss: value of the loss.
        loss_of: the loss itself.
        forwards: what ran forward for it.
        learned: what is known of this line.
        flags: ``schema.FLAGS``.
        candidates: for each input, what may be its updated tensor, in order.
        writes: for each input, in-place updates seen.
        used: for each input, the candidate that was first used as a weight.
        met: whether something made of gradient and parameter was computed with otherwise.
        written: values after the last in-place update.
        loaded: addresses, in order, of what was overwritten with values made of its gradients in
            memory of none of its inputs.
        clipped: whether its gradients were clipped by hand, where that is to be read later.
        displaced: inputs that were put elsewhere before their update, or written to with a value
            that was made without them; whether that is known to be where their task began.
        moved_back: inputs that were, after that, computed with what they began from: no update.
        marks: the parameters' own marks at that time.
        uncounted: whether they were written to where nothing but their values would show it.
        escaped: whether a gradient went where it cannot be followed: out of torch (``.numpy()``),
            or with its parameters into a compiled function.
        followed: whether the function mode was on for it.
        complete: whether it was followed no further than to the update, not to its first use.
        recited: its update, where that was the one known by heart.
        width: tasks batched by vmap.
        carried: leaves with the ``.grad`` that was there before a backward.
        task: the task it goes on with, where it was taken of that task's fast weights.
        adapting: otherwise, the task in which an optimizer adapts all it was taken of.
        named: otherwise, the model its inputs belong to and their positions in it.
        by_identity: whether its inputs are that model's own parameters.
        of_base: whether its inputs are the base of earlier tasks.
        leaves: what its inputs are, or were cloned from, where it goes on with no task.
        through: whether its loss was computed with the fast weights of a task, and it is of other
            leaves: the gradient of who looks ahead at what a task makes of another's weights.
        through_task: the same, where it is of such leaves among others.
        base: the tensors a base has at its positions, where its memory was asked for.
        base_written: by position in it, what was written with the gradient into a base that it was
            not taken of, and the line that did.
        restarts: whether they are the fast weights of the task before, written anew in place.
        origins: what its inputs were deep-copied from, where they all were.
        in_the_middle: whether its loop is known, and goes on with a gradient of the same kind.
        made_by: one past the number of the autograd node that made its last input; -1 a leaf.
        ended: the next autograd node's number when it had been taken.
        place: address of the memory behind its last input that was there when it was taken, where
            it is followed; 0 unknown.
        passed_by: how often an optimizer stepped what its inputs are copies of, without a gradient.
        graph: of what it was taken of, where that was told to be left whole.
        point: where the leaves of a backward were, where they may be put back before it is used.
    """

    site: int
    function: str
    inputs: list[weakref.ref[Tensor]]
    before: Sequence[Tensor]
    gradients: Sequence[Tensor | None]
    forwards: Forwards
    learned: Learned
    loss: Number = None
    loss_of: weakref.ref[Tensor] | None = None
    flags: int = 0
    candidates: list[list[Candidate]] = field(default_factory=list)
    writes: list[int] = field(default_factory=list)
    used: dict[int, int] = field(default_factory=dict)
    written: dict[int, Tensor] = field(default_factory=dict)
    loaded: dict[int, None] = field(default_factory=dict)
    displaced: dict[int, bool] = field(default_factory=dict)
    clipped: list[Tensor] = field(default_factory=list)
    moved_back: set[int] = field(default_factory=set)
    marks: dict[int, Mark] = field(default_factory=dict)
    uncounted: bool = False
    escaped: bool = False
    met: bool = False
    followed: bool = False
    complete: bool = False
    recited: Recital | None = None
    width: int = 1
    carried: list[tuple[weakref.ref[Tensor], Tensor]] = field(default_factory=list)
    task: Task | None = None
    adapting: Task | None = None
    named: tuple[KnownModel, list[int]] | None = None
    by_identity: bool = False
    of_base: bool = False
    leaves: list[weakref.ref[Tensor]] = field(default_factory=list)
    through: bool = False
    through_task: bool = False
    base: dict[int, int] | None = None
    base_written: dict[int, tuple[Tensor, int]] = field(default_factory=dict)
    restarts: bool = False
    origins: list[weakref.ref[Tensor]] | None = None
    in_the_middle: bool = False
    made_by: int = -1
    ended: int = -1
    point: Point | None = None
    place: int = 0
    passed_by: int = 0
    graph: weakref.ref[Watched] | None = None

    def set_loss(self, loss: Tensor | None) -> None:
        """Note what the gradient was taken of, and its value where it is a single number."""
        self.loss_of = weakref.ref(loss) if loss is not None else None
        self.loss = number_of(loss)

    def expect_evidence(self) -> None:
        """Make room for what is seen of each input; empty as long as nothing is followed."""
        missing = len(self.inputs) - len(self.candidates)
        self.candidates += [[] for _ in range(missing)]
        self.writes += [0] * missing

    @property
    def may_become_a_script(self) -> bool:
        """Whether it is worth noting every operation of its update."""
        learned = self.learned
        return (
            self.function != "backward"
            and self.width == 1
            and not learned.piecewise
            and not learned.discards
            and learned.confirmed >= _TRUSTED
            and learned.scripts < _MOST_SCRIPTS
        )

    def learn_script(self, heard: Sequence[Heard], differentiable: bool) -> None:
        """Every candidate that was right before has been made by the operations ``heard``."""
        learned = self.learned
        learned.scripts += 1
        right: list[Candidate | None] = [
            candidates[position] if 0 <= position < len(candidates) else None
            for candidates, position in zip(self.candidates, learned.candidates or (), strict=True)
        ]
        chosen = [candidate for candidate in right if candidate is not None]
        if chosen and len({candidate.cut for candidate in chosen}) == 1:
            learned.script = Script.of(
                heard,
                [reference() for reference in self.inputs],
                [candidate.tensor() if candidate is not None else None for candidate in right],
                differentiable,
                chosen[0].cut,
            )

    def leads_to(self, updated: Tensor) -> bool:
        """Whether a tensor was made of the last input, in a few operations.

        (Another model's weights, or the next task's, can be of the same shapes. The input itself
        may be gone; its node is in the graph.)
        """
        parameter = self.inputs[-1]() if self.made_by < 0 else None
        if self.made_by < 0 and parameter is None:
            return True
        level: list[Any] = [updated.grad_fn]
        for _ in range(_MOST_LEVELS):
            for node in level:
                if self.made_by >= 0 and node._sequence_nr() + 1 == self.made_by:
                    return True
                if parameter is not None and getattr(node, "variable", None) is parameter:
                    return True
            level = [n for node in level for n, _ in node.next_functions if n is not None]
            level = level[:_MOST_NODES]
        return False

    @property
    def updated(self) -> bool:
        """Whether anything looks like an update so far."""
        return any(self.writes) or any(self.candidates)

    @property
    def left_torch(self) -> bool:
        """Whether its update may have been made where it cannot be followed.

        Not where its weights have been stepped, at another line, or in torch: then it is the
        query's gradient that left.
        """
        task, learned = self.task or self.adapting, self.learned
        if not self.escaped or task is None or task.ended or not task.steps:
            return self.escaped
        in_torch = learned.candidates is not None or learned.functional is False
        return task.learned is learned and not in_torch

    @property
    def home(self) -> tuple[Task, list[int]] | None:
        """The task whose adapted weights it was taken of, and their positions in the model."""
        if self.task is not None:
            return self.task, self.task.positions
        if self.adapting is None:
            return None
        places = self.adapting.places()
        found = [places.get(id(reference())) for reference in self.inputs]
        known = [place for place in found if place is not None]
        return (self.adapting, known) if len(known) == len(found) else None

    def began_at(self, index: int) -> Tensor | None:
        """What an input was when the task began whose weights it is of; its own value elsewhere."""
        home = self.home
        if home is None or home[0].first is None or index >= len(home[1]):
            return self.before[index]
        return home[0].first.before[home[1][index]]

    @property
    def is_put_back(self) -> bool:
        """Whether all it was taken of was put back to where its task began, and not moved since."""
        back = self.displaced
        return len(back) == len(self.inputs) and all(back.values()) and not any(self.writes)

    @property
    def stands(self) -> bool:
        """Whether nothing was written into the parameters since their update."""
        tensors = [reference() for reference in self.inputs]
        return bool(self.marks) and all(
            tensor is None or mark_of(tensor) == self.marks.get(index)
            for index, tensor in enumerate(tensors)
        )

    def reached(self, tensors: Iterable[Tensor]) -> bool:
        """Whether it gave any of ``tensors`` a gradient.

        (Where an optimizer is known to take the step the leaves are not searched for: then it is
        that optimizer's parameters.)
        """
        references = self.inputs or self.learned.optimizer or []
        ids = set(map(id, tensors))
        return any(id(reference()) in ids for reference in references)

    def is_input(self, tensor: Tensor) -> int | None:
        """Which input ``tensor`` is, by identity."""
        for index, reference in enumerate(self.inputs):
            if reference() is tensor:
                return index
        return None

    @property
    def has_every_candidate(self) -> bool:
        """Whether every candidate that was right the last times at this line has been made."""
        learned = self.learned
        if learned.confirmed < _TRUSTED or learned.discards:
            return False
        if not learned.functional or learned.candidates is None:
            return False
        if len(learned.candidates) != len(self.candidates) or any(self.writes):
            return False
        return all(
            len(candidates) > expected or shape is None
            for candidates, expected, shape in zip(
                self.candidates, learned.candidates, shapes_of(self.gradients), strict=True
            )
        )


def number_of(loss: Tensor | None) -> Number:
    """The value of a loss of a single number; a tensor where reading it would be waiting for it."""
    if loss is None or loss.numel() != 1:
        return None
    value = physical(loss)[0]
    return value.item() if is_number_at_hand(value) else value.detach()
