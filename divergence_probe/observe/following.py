"""Follow tensors from gradients to the parameters they update.

The hard part is the *after*: "the first operation that takes gradient and parameter" is wrong as
soon as there is weight decay (``g + wd * p`` comes first). So every candidate is kept, and which
was meant is settled by evidence: a write into the parameter's own memory, identity with what the
next gradient is taken of, the first use as a weight, or what was right at this line before.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from divergence_probe.observe import mode_stack
from divergence_probe.observe.at_hand import are_same, mark_of, waits_for_nothing
from divergence_probe.observe.clipping import note_clipping
from divergence_probe.observe.guard import Guard
from divergence_probe.observe.lineage import UNRELATED, Ancestry, Lineage
from divergence_probe.observe.operations import Operation, operation_of
from divergence_probe.observe.pending import Candidate, Pending
from divergence_probe.observe.recital import Heard, Recital
from divergence_probe.observe.snapshot import shapes_of
from divergence_probe.observe.standstill import note_standstill
from divergence_probe.observe.tensors import (
    address_of,
    are_plain,
    batched,
    changes_of,
    is_unreal,
    plain,
    storage_of,
    tensors_in,
)
from divergence_probe.record.schema import FLAGS


class Follower(TorchFunctionMode):
    """On from a gradient call until its update is complete; then it only passes through."""

    def __init__(
        self, guard: Guard, elsewhere: Callable[[Pending, Tensor], bool] | None = None
    ) -> None:
        super().__init__()
        self._guard = guard
        # told of memory no input has that was written a gradient into; whether it is a base's
        self._elsewhere = elsewhere
        self._pending: Pending | None = None
        self._gradients: list[tuple[int, weakref.ref[Tensor]]] = []
        self._recital: Recital | None = None
        self._learning: list[Heard] | None = None
        self._lineage = Lineage()
        # what is a candidate in another shape, and which one
        self._reshaped: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self._storages: dict[int, list[int]] = {}
        self._pushed = self._paused = False
        self._handling = 0

    def follow(self, pending: Pending, gradients: Sequence[Tensor | None]) -> None:
        """Start (or go on) following ``pending``; ``gradients`` are the user's own tensors.

        They are those of the last call: where there is one a parameter, of the last inputs.
        """
        goes_on = self._pending is pending
        if not goes_on:
            self._forget()
            self._pending = pending
        pending.expect_evidence()
        first = len(pending.inputs) - len(gradients)
        self._gradients = [
            (index, weakref.ref(gradient))
            for index, gradient in enumerate(gradients, first)
            if gradient is not None
        ]
        script = pending.learned.script
        if script is None or goes_on or script.parameters != len(pending.inputs):
            self._tag_all(pending)
            self._learning = [] if pending.may_become_a_script and not goes_on else None
        else:
            self._recital = Recital(script, pending.inputs)
        self._guard.state.once_over(self._look_on)

    def _tag_all(self, pending: Pending) -> None:
        """Tag the parameters and the gradients, the ends that an update ties together."""
        for index, reference in enumerate(pending.inputs):
            tensor = reference()
            if tensor is not None:
                self._lineage.add(tensor, Ancestry(parameters=frozenset((index,))))
                pending.place = pointer = storage_of(tensor)
                if pointer:
                    self._storages.setdefault(pointer, []).append(index)
        for index, reference in self._gradients:
            gradient = reference()
            if gradient is not None:
                self._lineage.add(gradient, Ancestry(gradients=frozenset((index,))))

    def _look_on(self) -> None:
        if self._pending is not None:
            if not self._pushed:
                self._push()
            self._pending.followed = True

    def _push(self) -> None:
        mode_stack.put_on(self)
        self._pushed, self._guard.state.on_stack = True, self

    def pause(self) -> None:
        """Leave the mode stack for a while; for good where there is nothing left to see."""
        self._paused = self._leave() and self._pending is not None

    def resume(self) -> None:
        """Go back to it, unless what was being followed is over."""
        if self._paused and self._pending is not None:
            self._push()
        self._paused = False

    def stop(self) -> None:
        """Forget what was followed, and leave the mode stack."""
        if self._recital is not None and self._recital.heard and self._pending is not None:
            with self._guard.work():
                self._catch_up(self._pending, self._recital)
        self._forget()
        self._leave()

    def _leave(self) -> bool:
        """Leave the mode stack; whether that could be done."""
        if not self._pushed or self._handling:
            # (While it handles a call torch has taken it off the stack, and will put it back.)
            return False
        mode_stack.take_off(self)
        self._pushed, self._guard.state.on_stack = False, None
        return True

    def _forget(self) -> None:
        """Look at nothing more; the mode, if it is on, only passes through."""
        self._pending = self._recital = self._learning = None
        self._gradients = []
        self._lineage.clear()
        if self._storages or self._reshaped:
            self._storages, self._reshaped = {}, {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the user's operation, then look at where it leads."""
        if torch.compiler.is_compiling():  # first of all: what follows must not be compiled in
            return func(*args, **kwargs) if kwargs else func(*args)
        self._handling += 1
        try:
            result = func(*args, **kwargs) if kwargs else func(*args)
        finally:
            self._handling -= 1
        pending = self._pending
        if pending is None:
            return result
        guard = self._guard
        state = guard.threads.state
        if state.gradient or state.away or not guard.active or is_unreal():
            return result
        if (recital := self._recital) is not None:
            try:
                as_expected = recital.hear(func, args, kwargs, result)
            except Exception as error:
                guard.fail(error)
                return result
            if not as_expected or recital.complete:
                self._heard(pending, recital)
            return result
        if self._learning is not None:
            self._learning.append(Heard(func, args, kwargs, result))
        operation = operation_of(func)
        if operation.unrelated or not self._concerns(operation, args, kwargs):
            return result
        with state:
            self._look(pending, operation, args, kwargs or {}, result)
            if pending.has_every_candidate:
                pending.complete = True
                if self._learning is not None:
                    pending.learn_script(self._learning, state.differentiable)
                self._forget()
        return result

    def went_by(self, arguments: Any, result: Any) -> None:
        """A call that no mode sees the inside of, as of a compiled function, is over.

        What it was given and gave back is known: gradients that went in are in all that came out.
        A whole update is known by its shapes; of any other one it can only be said that it escaped,
        as where nothing is known to have come out.
        """
        pending = self._pending
        if pending is None or self._recital is not None:
            return
        taken = self._lineage.of_all(tensors_in(arguments))
        if not taken.gradients:
            return
        pending.learned.flags |= FLAGS["transformed"]
        pending.flags |= pending.learned.flags
        made = tensors_in(result)
        if made and not taken.parameters:
            for tensor in made:
                self._made(pending, tensor, taken)
        elif [tensor.shape for tensor in made] == list(shapes_of(pending.before)):
            for index, tensor in enumerate(made):
                own = frozenset((index,))
                self._made(pending, tensor, Ancestry(own, own))
        else:
            pending.escaped = True

    def _heard(self, pending: Pending, recital: Recital) -> None:
        """An update known by heart was heard to its end, or turned out to be another one."""
        if recital.complete:
            pending.recited = recital
            pending.complete = True
            self._forget()
        else:
            with self._guard.work():
                self._catch_up(pending, recital)

    def _catch_up(self, pending: Pending, recital: Recital) -> None:
        """It is another update than the one known: follow what was heard of it so far."""
        self._recital = pending.learned.script = None
        self._tag_all(pending)
        for one in map(Heard._make, recital.heard):
            operation = operation_of(one.func)
            if not operation.unrelated and self._concerns(operation, one.args, one.kwargs):
                self._look(pending, operation, one.args, one.kwargs or {}, one.result)

    def _concerns(self, operation: Operation, args: Any, kwargs: Any) -> bool:
        """Whether an operation can matter: most of a forward's neither take nor write our own."""
        lineage = self._lineage
        for arg in args:
            if arg in lineage or type(arg) in (list, tuple):
                return True
        return bool(kwargs) or operation.in_place

    def _look(
        self, pending: Pending, operation: Operation, args: Any, kwargs: Any, result: Any
    ) -> None:
        if operation.foreach:
            self._foreach(pending, operation, args, kwargs, result)
            return
        if "out" in kwargs:
            operation, args, kwargs = _as_in_place(operation, args, kwargs)
        taken, steps, cut = self._taken(pending, operation, args, kwargs)
        in_place = operation.in_place and args and isinstance(args[0], Tensor)
        if in_place and self._written(
            pending, args[0], operation, taken, list(_tensors(args[1:], kwargs))
        ):
            return
        if taken == UNRELATED or self._is_activation(pending, operation, taken):
            return
        gradients_only = bool(taken.gradients) and not taken.parameters
        if gradients_only and operation.clips and isinstance(args[0], Tensor):
            note_clipping(pending, operation, plain(args[0]), plain(result), (args, kwargs))
        if taken.gradients and operation.escapes:
            pending.escaped = True
        note_standstill(pending, taken.updated, result, operation, steps, _rates(args, kwargs))
        if gradients_only:
            self._note_step(args, kwargs, result)
        for tensor in _results(result):
            if cut and taken.gradients:
                self._lineage.add_cut(tensor)
            self._made(pending, tensor, taken)
            if (operation.reshapes or operation.converts) and args and taken.updated:
                self._reshape(pending, args[0], tensor, taken.updated)

    def _note_step(self, args: Any, kwargs: Any, result: Any) -> None:
        """Note what a result is made of besides gradients: it may be a whole step from there."""
        others = [tensor for tensor in _tensors(args, kwargs) if tensor not in self._lineage]
        for tensor in _results(result) if others else ():
            self._lineage.add_step(tensor, others)

    def _taken(
        self, pending: Pending, operation: Operation, args: Any, kwargs: Any
    ) -> tuple[Ancestry, list[Tensor], bool]:
        """What an operation takes.

        Returns:
            What that is made of, the tensors with gradient in them, and whether that is detached
            from the graph.
        """
        taken = UNRELATED
        steps: list[Tensor] = []
        # What is overwritten does not matter to the value that comes out, only what it is made of;
        # nor does what only lends its shape, or its kind.
        alone = operation.reshapes or operation.converts
        sources = args[1:] if operation.overwrites else args[:1] if alone else args
        cut = operation.detaches or not self._guard.differentiable
        for tensor in _tensors(sources, kwargs):
            ancestry = self._lineage.of(tensor)
            taken |= ancestry
            if ancestry.gradients:
                cut |= self._lineage.is_cut(tensor)
                steps.append(tensor)
            for index in ancestry.updated:
                self._used(pending, index, tensor, operation, args)
        return taken, steps, cut

    def _is_activation(self, pending: Pending, operation: Operation, taken: Ancestry) -> bool:
        """Whether what comes out is an activation, not a parameter, as out of a weight operation.

        But for one that is given gradients: a learned optimizer or a preconditioner makes updates.
        """
        if operation.uses_weights and not taken.parameters:
            pending.learned.flags |= FLAGS["transformed"]
            pending.flags |= pending.learned.flags
        return operation.uses_weights and bool(taken.parameters)

    def _reshape(
        self, pending: Pending, tensor: Tensor, result: Tensor, indices: frozenset[int]
    ) -> None:
        """``result`` is ``tensor`` in another shape: used, it is what that one is."""
        for index in indices:
            position = self._candidate(pending, index, tensor)
            if position is not None:
                self._reshaped[id(result)] = (weakref.ref(result), position)

    def _candidate(self, pending: Pending, index: int, tensor: Tensor) -> int | None:
        """Which of an input's candidates a tensor is, in whatever shape.

        One of another kind than the parameter's that was made of another one is that: a half copy
        that is used is the parameter's.
        """
        reshaped = self._reshaped.get(id(tensor))
        known = reshaped is not None and reshaped[0]() is tensor
        for position, candidate in enumerate(pending.candidates[index]):
            if candidate.tensor() is tensor or _rearranged(candidate, tensor):
                if known and tensor.dtype is not pending.before[index].dtype:
                    break
                return position
        return reshaped[1] if reshaped is not None and known else None

    def _foreach(
        self, pending: Pending, operation: Operation, args: Any, kwargs: Any, result: Any
    ) -> None:
        lists = [arg for arg in args if isinstance(arg, list | tuple)]
        if not lists:
            return
        made = result if isinstance(result, list | tuple) else ()
        for position, first in enumerate(lists[0]):
            members = [m[position] for m in lists if position < len(m)]
            taken = self._lineage.of_all(members)
            steps = [member for member in members if self._lineage.of(member).gradients]
            new = first if operation.in_place or position >= len(made) else made[position]
            rates = _rates(args, kwargs)
            note_standstill(pending, taken.updated, new, operation, steps, rates)
            if operation.in_place and isinstance(first, Tensor):
                self._written(pending, first, operation, taken, members[1:])
            elif position < len(made) and isinstance(made[position], Tensor):
                self._made(pending, made[position], taken)

    def _written(
        self,
        pending: Pending,
        target: Tensor,
        operation: Operation,
        taken: Ancestry,
        operands: Sequence[Tensor] = (),
    ) -> bool:
        """``target`` was overwritten: an update if its memory is a parameter's.

        Returns:
            Whether it is a base's, moved by what its task came to: what is made of that from now on
            (the clones of the next task) is no update of this one.
        """
        index = pending.is_input(target) if operation.name == "data.__set__" else None
        if index is not None:  # its memory is another from now on
            self._storages.setdefault(storage_of(target), []).append(index)
        else:
            index = self._parameter_at(pending, target)
        updated = index is not None and pending.writes[index] and index not in pending.moved_back
        if index is not None and updated and _moves_back(pending, index, operands):
            pending.moved_back.add(index)
        first = index is not None and not pending.writes[index]
        if index is not None and first and operation.overwrites and not taken.parameters:
            # (Later writes only put back what was updated.)
            pending.displaced[index] = self._from_start(pending, index, operands, taken)
        if index is not None and self._updates(pending, index, operation, taken):
            pending.writes[index] += 1
            # Read now: the next thing to happen may be a restore of the base's weights.
            pending.written[index] = batched(target, pending.width).detach().clone()
            parameter = pending.inputs[index]()
            if parameter is not None:
                pending.marks[index] = mark_of(parameter)
                pending.uncounted |= _is_uncounted(target, parameter, operation)
        if index is None and taken.gradients and operation.overwrites:
            pending.loaded[address_of(target)] = None
        elsewhere = index is None and taken.gradients and self._elsewhere is not None
        if elsewhere and self._elsewhere(pending, target):  # type: ignore[misc]
            self._lineage.drop(target)
            return True
        self._lineage.add(target, taken)
        return False

    def _from_start(
        self, pending: Pending, index: int, values: Sequence[Tensor], taken: Ancestry
    ) -> bool:
        """Whether what is written is where a parameter's task began, or a step from there."""
        if not taken.gradients:
            return _moves_back(pending, index, values)
        for value in values:
            others = self._lineage.step_from(value)
            if others is not None:
                return _moves_back(pending, index, others)
        return False

    def _parameter_at(self, pending: Pending, target: Tensor) -> int | None:
        """Whose memory ``target`` is; several parameters may be views of one vector.

        (That of one which is gone, or has other memory by now, may be anybody's.)
        """
        place = storage_of(target)
        known = self._storages.get(place)
        if known is None:
            return None
        alive = [(i, t) for i in known if (t := pending.inputs[i]()) is not None]
        indices = [(index, tensor) for index, tensor in alive if storage_of(tensor) == place]
        if len(indices) == 1:
            return indices[0][0]
        address = plain(target).data_ptr() if indices else 0
        for index, tensor in indices:
            if plain(tensor).data_ptr() == address:
                return index
        return None

    def _updates(self, pending: Pending, index: int, operation: Operation, taken: Ancestry) -> bool:
        """Whether a write is (part of) the update, and not a restore of older values."""
        if operation.overwrites and pending.writes[index]:
            return False  # the update is complete: this restores or moves the weights
        if index in pending.moved_back:
            return False
        if taken.gradients or pending.escaped:
            return True
        return bool(pending.writes[index])

    def _made(self, pending: Pending, tensor: Tensor, taken: Ancestry) -> None:
        if taken == UNRELATED:
            return
        self._lineage.add(tensor, taken)
        if self._parameter_at(pending, tensor) is not None:
            return  # a view or an alias of the parameter itself
        for index in taken.updated:
            shape = shapes_of(pending.before)[index] or torch.Size()
            known = pending.candidates[index]
            same = tensor.shape == shape or (pending.width > 1 and tensor.shape == shape[1:])
            if same and not any(
                candidate.tensor() is tensor or _rearranged(candidate, tensor)
                for candidate in known
            ):
                value = batched(tensor, pending.width).detach()
                place = 0
                if pending.learned.rebinds:  # it will be the parameter's memory, and written to
                    place, value = storage_of(value), value.clone()
                cut = self._lineage.is_cut(tensor)
                known.append(Candidate(weakref.ref(tensor), value, cut, place))

    def _used(
        self, pending: Pending, index: int, tensor: Tensor, operation: Operation, args: Any
    ) -> None:
        """Note the use of a candidate: as a weight, or otherwise with tensors of another kind."""
        weight = operation.uses_weights
        if not weight and pending.met:
            return
        position = self._candidate(pending, index, tensor)
        if position is not None and weight:
            pending.used.setdefault(index, position)
        elif position is not None:
            pending.met |= self._meets_others(tensor, operation, args)

    def _meets_others(self, tensor: Tensor, operation: Operation, args: Any) -> bool:
        """Whether what may be an updated parameter is computed with, as a weight is.

        Not where it is only summed up (a penalty of importances), or collected outside the graph in
        a tensor of its own shape (the importances themselves).
        """
        if operation.in_place and args and args[0] is not tensor:
            return False
        return any(
            other.numel() > 1
            and other not in self._lineage
            and (tensor.requires_grad or other.shape != tensor.shape)
            for other in _tensors(args, {})
        )


def _moves_back(pending: Pending, index: int, operands: Sequence[Tensor]) -> bool:
    """Whether an updated parameter is computed with what it was when its task began.

    So Reptile moves it half the way back. Looked at only where that waits for nothing.
    """
    start = pending.began_at(index)
    return start is not None and any(
        are_plain((other,)) and are_same(other, start) for other in operands
    )


def _is_uncounted(target: Tensor, parameter: Tensor, operation: Operation) -> bool:
    """Whether a write went through ``.data``, where torch does not count it and values are afar."""
    if waits_for_nothing(parameter):
        return False
    return operation.name == "data.__set__" or changes_of(target) != changes_of(parameter)


def _rearranged(candidate: Candidate, tensor: Tensor) -> bool:
    """Whether a tensor is a candidate's own memory in another order: a square weight transposed."""
    value = candidate.value
    if value.dim() < 2 or tensor.dim() != value.dim() or tensor.layout is not torch.strided:
        return False
    return tensor.stride() != value.stride() and storage_of(tensor) == storage_of(value)


def _tensors(args: Iterable[Any], kwargs: dict[str, Any]) -> Iterable[Tensor]:
    for arg in (*args, *kwargs.values()):
        if isinstance(arg, Tensor):
            yield arg
        elif isinstance(arg, list | tuple):
            for member in arg:
                if isinstance(member, Tensor):
                    yield member


def _as_in_place(
    operation: Operation, args: Any, kwargs: dict[str, Any]
) -> tuple[Operation, Any, dict[str, Any]]:
    """What is told to write into its ``out=``, as if it were a method of that."""
    others = {name: value for name, value in kwargs.items() if name != "out"}
    target = kwargs["out"]
    return operation.into(target, _tensors(args, others)), (target, *args), others


def _rates(args: Iterable[Any], kwargs: dict[str, Any]) -> list[float]:
    """Numbers an operation multiplies by; whole ones without a name are axes and sizes."""
    named = [kwargs[name] for name in ("alpha", "value", "weight") if name in kwargs]
    return [value for value in args if type(value) is float] + [
        value for value in named if isinstance(value, int | float)
    ]


def _results(result: Any) -> Iterable[Tensor]:
    if isinstance(result, Tensor):
        return (result,)
    if isinstance(result, list | tuple):
        return [member for member in result if isinstance(member, Tensor)]
    return ()
