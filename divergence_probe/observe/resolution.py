"""Which of the candidates is the updated parameter: evidence first, memory second, doubt last."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from divergence_probe.observe.following import Pending
from divergence_probe.observe.models import Models
from divergence_probe.observe.tensors import base_of, batched, physical
from divergence_probe.record.schema import FLAGS


@dataclass
class Update:
    """What a pending gradient turned into.

    Attributes:
        tensors: for each input the user's updated tensor, None where it was not seen.
        values: for each input its value.
        certain: whether every choice rests on evidence.
        in_place: whether the parameters' own memory was written.
    """

    tensors: list[Tensor | None]
    values: list[Tensor | None]
    certain: bool = True
    in_place: bool = False

    @property
    def complete(self) -> bool:
        """Whether every input's update was seen."""
        return all(value is not None for value in self.values)


def resolve(pending: Pending, following: Sequence[Tensor], models: Models) -> Update | None:
    """The update ``pending`` led to, or None where none did.

    Args:
        pending: the gradient.
        following: what the next gradient is taken of; empty where there is no next one.
        models: the user's models, to tell a new task's start from an update.
    """
    if pending.written:
        return _in_place(pending)
    if _discarded(pending, following):
        pending.flags |= FLAGS["discarded"]
        return Update([reference() for reference in pending.inputs], list(pending.before))
    continues = _continues(pending, following, models)
    update = Update([], [])
    right: list[int] = []
    found = False
    for index in range(len(pending.inputs)):
        choice = _choose(pending, index, following, continues)
        update.certain &= choice.certain
        right.append(choice.position)
        found |= choice.value is not None and pending.gradients[index] is not None
        update.tensors.append(choice.tensor)
        update.values.append(choice.value)
    if not found:
        return None
    if _cut(pending, right):
        pending.flags &= ~FLAGS["second_order"]
    _learn(pending, right, update.certain)
    return update


def _discarded(pending: Pending, following: Sequence[Tensor]) -> bool:
    """Whether an update was made and thrown away: the next gradient is taken at the same point.

    A task of a single step also leads back to the base's own tensors, but there what the step made
    was used, in the query's forward. Where that was not looked for, nothing shows it was not.
    """
    if not any(pending.candidates) or pending.used or pending.complete:
        return False
    if len(following) != len(pending.inputs):
        return False
    return all(
        reference() is tensor for reference, tensor in zip(pending.inputs, following, strict=True)
    )


def _cut(pending: Pending, right: list[int]) -> bool:
    """Whether every chosen update was made of detached gradients."""
    chosen = [
        candidates[position]
        for position, candidates in zip(right, pending.candidates, strict=True)
        if 0 <= position < len(candidates)
    ]
    return bool(chosen) and all(candidate.cut for candidate in chosen)


def _in_place(pending: Pending) -> Update:
    learned = pending.learned
    learned.confirmed += 1
    learned.functional = False
    tensors = [reference() for reference in pending.inputs]
    values = [pending.written.get(index, before) for index, before in enumerate(pending.before)]
    return Update(tensors, list(values), in_place=True)


def _learn(pending: Pending, right: list[int], certain: bool) -> None:
    learned = pending.learned
    learned.functional = True
    if not certain:
        return
    if any(position >= 0 for position in right):
        if learned.candidates == right:
            learned.confirmed += 1
        learned.candidates = right
    else:
        learned.confirmed += 1


@dataclass
class _Choice:
    position: int
    tensor: Tensor | None
    value: Tensor | None
    certain: bool = True


def _choose(pending: Pending, index: int, following: Sequence[Tensor], continues: bool) -> _Choice:
    """The updated tensor of one input."""
    candidates = pending.candidates[index]
    for position, candidate in enumerate(candidates):
        tensor = candidate.tensor()
        if tensor is not None and any(tensor is other for other in following):
            return _Choice(position, tensor, candidate.value)
    if continues and not candidates:
        value = batched(following[index], pending.width).detach()
        return _Choice(-1, following[index], value)
    learned = pending.learned.candidates
    expected = learned[index] if learned is not None and index < len(learned) else None
    for wanted in (pending.used.get(index), expected):
        if wanted is not None and 0 <= wanted < len(candidates):
            return _Choice(wanted, candidates[wanted].tensor(), candidates[wanted].value)
    if candidates:
        last = candidates[-1]
        certain = len(candidates) == 1
        return _Choice(len(candidates) - 1, last.tensor(), last.value, certain)
    if pending.gradients[index] is None:
        tensor = pending.inputs[index]()
        return _Choice(-1, tensor, pending.before[index])
    return _Choice(-1, None, None)


def _continues(pending: Pending, following: Sequence[Tensor], models: Models) -> bool:
    """Whether what the next gradient is taken of can only be this update's result.

    Used where nothing was followed (the middle of a task of known length) or the update left torch.
    """
    if len(following) != len(pending.inputs) or (pending.followed and not pending.escaped):
        return False
    for tensor, before in zip(following, pending.before, strict=True):
        value = physical(tensor)[0]
        shapes = (before.shape, before.shape[1:]) if pending.width > 1 else (before.shape,)
        if value.shape not in shapes:
            return False
        if models.find(tensor) is not None or base_of(tensor) is not None:
            return False
    return any(pending.is_input(tensor) is None for tensor in following)
