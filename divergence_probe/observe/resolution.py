"""Which of the candidates is the updated parameter: evidence first, memory second, doubt last."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor as is_wrapped

from divergence_probe.observe.at_hand import mark_of
from divergence_probe.observe.models import Models
from divergence_probe.observe.pending import MOST_IN_TURN, Made, Pending
from divergence_probe.observe.recital import Recital
from divergence_probe.observe.snapshot import are_whole, is_empty, shapes_of, snapshot
from divergence_probe.observe.tensors import (
    address_of,
    base_of,
    batched,
    physical,
    storage_of,
)
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
    values: Sequence[Tensor | None]
    certain: bool = True
    in_place: bool = False

    @property
    def complete(self) -> bool:
        """Whether every input's update was seen."""
        return are_whole(self.values)


def resolve(
    pending: Pending, following: Sequence[Tensor], models: Models, elsewhere: bool = False
) -> Update | None:
    """The update ``pending`` led to, or None where none did.

    Args:
        pending: the gradient.
        following: what the next gradient is taken of; empty where there is no next one.
        models: the user's models, to tell a new task's start from an update.
        elsewhere: whether the next gradient is taken at another line: that of who looks ahead, say.
    """
    if (evident := _evident(pending, following)) is not None:
        return evident
    if not pending.candidates:  # the middle of a task of known length: nothing was followed
        return _unfollowed(pending, following, models)
    if (rebound := _rebound(pending)) is not None:
        return rebound
    if _discarded(pending, following, elsewhere):
        pending.flags |= FLAGS["discarded"]
        pending.learned.discards = True
        return Update([reference() for reference in pending.inputs], list(pending.before))
    continues = _continues(pending, following, models)
    if continues and pending.followed and not pending.escaped:
        pending.learned.unmaps = True
    tensors: list[Tensor | None] = []
    values: list[Tensor | None] = []
    certain = True
    right: list[int] = []
    found = False
    with_gradient = [shape is not None for shape in shapes_of(pending.gradients)]
    for index in range(len(pending.inputs)):
        choice = _choose(pending, index, following, continues)
        if not choice.certain:
            choice = _as_the_others(pending, index, following, continues) or choice
        certain &= choice.certain
        right.append(choice.position)
        found |= choice.value is not None and with_gradient[index]
        tensors.append(choice.tensor)
        values.append(choice.value)
    if not found:
        return None
    if not _is_used(pending, tensors, following):
        pending.learned.unclaimed = [*pending.learned.unclaimed[1 - MOST_IN_TURN :], _made(pending)]
        return None
    if _cut(pending, right):
        pending.flags &= ~FLAGS["second_order"]
    _learn(pending, right, certain)
    return Update(tensors, snapshot(values, copy=False) if pending.width == 1 else values, certain)


def _evident(pending: Pending, following: Sequence[Tensor]) -> Update | None:
    """The update that was seen as it was made."""
    if pending.written:
        return _in_place(pending)
    if pending.recited is not None:
        return _recited(pending, pending.recited)
    return _loaded(pending, following) if pending.loaded else None


def _unfollowed(pending: Pending, following: Sequence[Tensor], models: Models) -> Update | None:
    """What the next gradient is taken of, if that can only be this one's result."""
    if is_empty(pending.gradients) or not _continues(pending, following, models):
        return None
    pending.learned.functional = True
    pending.learned.confirmed += 1
    if pending.width == 1 and not any(map(is_wrapped, following)):
        return Update(list(following), snapshot(following, copy=False))
    return Update(list(following), [batched(t, pending.width).detach() for t in following])


def _recited(pending: Pending, recital: Recital) -> Update:
    """The update that is known by heart; a parameter without a gradient stays what it was."""
    pending.learned.confirmed += 1
    if recital.script.cut:
        pending.flags &= ~FLAGS["second_order"]
    tensors = [
        (made[0] if made is not None else reference)()
        for made, reference in zip(recital.made, pending.inputs, strict=True)
    ]
    values = [
        made[1] if made is not None else pending.before[index]
        for index, made in enumerate(recital.made)
    ]
    return Update(tensors, snapshot(values, copy=False))


def _loaded(pending: Pending, following: Sequence[Tensor]) -> Update | None:
    """What the update was loaded into, if the next gradient is taken of that (and maybe of more).

    So the original DARTS code makes its virtual step: one vector of all weights, cut up again and
    loaded into a model of its own.
    """
    places = {address_of(tensor): tensor for tensor in following if tensor.is_leaf}
    made = [places[address] for address in pending.loaded if address in places]
    if pending.width > 1 or [tensor.shape for tensor in made] != list(shapes_of(pending.before)):
        return None
    return Update(list(made), snapshot(made, copy=True))


def _rebound(pending: Pending) -> Update | None:
    """The update, if parameters were given its memory.

    ``Tensor.set_`` and ``torch.utils.swap_tensors`` do that, which no function mode is told of.
    After a task's last step they may have been given another one since, or be gone: then the update
    is what it was there before.
    """
    learned, last = pending.learned, pending.inputs[-1]()
    if not pending.place or (last is not None and storage_of(last) == pending.place):
        return None
    for index, candidates in enumerate(pending.candidates):
        parameter = pending.inputs[index]()
        if parameter is None:
            continue
        place = storage_of(parameter)
        for candidate in candidates:
            if place == (candidate.place or storage_of(candidate.value)):
                pending.written[index] = candidate.value.clone()
                pending.marks[index] = mark_of(parameter)
    if not pending.written and learned.rebinds:
        values = [_choose(pending, i, (), False).value for i in range(len(pending.inputs))]
        pending.written = {i: value for i, value in enumerate(values) if value is not None}
    if not pending.written:
        return None
    learned.rebinds = True
    return _in_place(pending)


def _discarded(pending: Pending, following: Sequence[Tensor], elsewhere: bool) -> bool:
    """Whether an update was made and thrown away: the next gradient is taken at the same point.

    A task of a single step also leads back to the base's own tensors, but there what the step made
    was used, in the query's forward. Where that was not looked for, nothing shows it was not. Nor
    where it is kept: it may have its turn when the other tasks have begun, too. So it is until the
    next one is made here, in a loop that forgets it.
    """
    learned = pending.learned
    if not any(pending.candidates) or pending.used or pending.complete:
        return False
    before, learned.unused = learned.unused, []
    forgotten = bool(before) and not _are_kept(before)
    if elsewhere:
        return forgotten
    if len(following) != len(pending.inputs) or any(
        reference() is not tensor
        for reference, tensor in zip(pending.inputs, following, strict=True)
    ):
        return False
    learned.unused = _made(pending)
    return forgotten or not _are_kept(learned.unused)


def _made(pending: Pending) -> Made:
    return [[candidate.tensor for candidate in options] for options in pending.candidates]


def _are_kept(made: Made) -> bool:
    """Whether one at least of what became of each parameter is still there."""
    return all(any(r() is not None for r in options) for options in made if options)


def _is_used(
    pending: Pending, updated: Sequence[Tensor | None], following: Sequence[Tensor]
) -> bool:
    """Whether the first update of what would be a task is used as weights, here or before.

    Gradients are also squared and summed up, or multiplied with distances of the weights (elastic
    weight consolidation, synaptic intelligence): nothing is adapted by that.
    """
    if pending.task is not None or pending.used or pending.met or pending.escaped:
        return True
    if not pending.followed or pending.learned.confirmed or pending.width > 1:
        return True  # (vmap's wrappers die with it: what uses them is not seen)
    made = {id(tensor) for tensor in updated if tensor is not None}
    return any(id(tensor) in made for tensor in following)


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
        # An update keeps its parameter's kind; what has another one is a copy, to be logged, say.
        kind = pending.before[index].dtype
        alike = [i for i, candidate in enumerate(candidates) if candidate.value.dtype is kind]
        chosen = alike or list(range(len(candidates)))
        last = candidates[chosen[-1]]
        return _Choice(chosen[-1], last.tensor(), last.value, len(chosen) == 1)
    if pending.gradients[index] is None:
        tensor = pending.inputs[index]()
        return _Choice(-1, tensor, pending.before[index])
    return _Choice(-1, None, None)


def _as_the_others(
    pending: Pending, index: int, following: Sequence[Tensor], continues: bool
) -> _Choice | None:
    """What is most likely where nothing decides: what is right for all that something decides.

    (A parameter that is no layer's weight, a policy's deviation, say, goes on through operations
    that keep its shape: the last of its candidates is what became of it, not the update.)
    """
    candidates = pending.candidates[index]
    others = {
        choice.position
        for other in range(len(pending.inputs))
        if len(pending.candidates[other]) > 0
        and (choice := _choose(pending, other, following, continues)).certain
    }
    position = others.pop() if len(others) == 1 else -1
    if not 0 <= position < len(candidates):
        return None
    return _Choice(position, candidates[position].tensor(), candidates[position].value, False)


def _left_its_map(pending: Pending, following: Sequence[Tensor]) -> bool:
    """Whether gradients of many tasks left the vmap they were taken in, and came back in weights.

    Outside they are other tensors, which nothing ties to those inside; each task has its own
    weights by then. (Gradients of single samples are of the same weights each time.)
    """
    if pending.width == 1 or any(pending.candidates):
        return False
    return all(physical(tensor)[1] == pending.width for tensor in following) and any(
        address_of(tensor) != value.data_ptr()
        for tensor, value in zip(following, pending.before, strict=True)
    )


def _continues(pending: Pending, following: Sequence[Tensor], models: Models) -> bool:
    """Whether what the next gradient is taken of can only be this update's result.

    Used where nothing was followed (the middle of a task of known length) or the update left torch.
    """
    if len(following) != len(pending.inputs):
        return False
    if pending.followed and not (pending.left_torch or _left_its_map(pending, following)):
        return False
    for tensor, shape in zip(following, shapes_of(pending.before), strict=True):
        own = physical(tensor)[0].shape
        if shape is None or (own != shape and (pending.width == 1 or own != shape[1:])):
            return False
        if models.find(tensor) is not None:
            return False
    last = following[-1] if following else None
    if pending.learned.script is not None and last is not None and last.grad_fn is not None:
        return pending.leads_to(last)
    inputs = {id(reference()) for reference in pending.inputs}
    fresh = next((tensor for tensor in following if id(tensor) not in inputs), None)
    return fresh is not None and base_of(fresh) is None  # clones of a base begin a new task
