"""Follow tensors from gradients to the parameters they update.

The hard part is the *after*: "the first operation that takes gradient and parameter" is wrong as
soon as there is weight decay (``g + wd * p`` comes first). So every candidate is kept, and which
was meant is settled by evidence: a write into the parameter's own memory, identity with what the
next gradient is taken of, the first use as a weight, or what was right at this line before.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from divergence_probe.observe.capture import Forwards, Number
from divergence_probe.observe.guard import Guard
from divergence_probe.observe.models import KnownModel
from divergence_probe.observe.tensors import batched, plain
from divergence_probe.record.schema import FLAGS

if TYPE_CHECKING:
    from divergence_probe.observe.session import Task

#: Operations that use a parameter as a weight: what they take is a finished parameter.
_WEIGHT_OPERATIONS = frozenset(
    {
        "linear", "bilinear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm",
        "baddbmm", "einsum", "tensordot", "embedding", "conv1d", "conv2d", "conv3d",
        "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "batch_norm", "layer_norm",
        "group_norm", "instance_norm", "rms_norm", "multi_head_attention_forward",
        "scaled_dot_product_attention", "lstm", "gru", "rnn_tanh", "rnn_relu", "prelu",
    }
)  # fmt: skip
_IN_PLACE_NAMES = frozenset(
    {"__iadd__", "__isub__", "__imul__", "__itruediv__", "__setitem__", "data.__set__"}
)


#: Operations whose result carries no graph.
_DETACHING = frozenset({"detach", "detach_", "data.__get__"})

#: Operations that bound a gradient element by element.
_CLIPPING = frozenset({"clamp", "clip", "clamp_", "clip_", "hardtanh"})

#: Accesses that lead from a parameter to something that is not made of its value.
_UNRELATED = frozenset({"grad.__get__", "grad.__set__", "shape.__get__", "size", "dim"})

#: Writes that replace a value whatever it was: without a gradient in them, a restore.
_OVERWRITES = frozenset({"copy_", "data.__set__", "fill_", "zero_", "set_", "__setitem__"})


# How often what was learned at a line must have been right to be relied on without more evidence.
_TRUSTED = 3


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
    """

    candidates: list[int] | None = None
    writes: list[int] | None = None
    steps: int | None = None
    previous_steps: int | None = None
    optimizer: list[weakref.ref[Tensor]] | None = None
    functional: bool | None = None
    piecewise: bool = False
    confirmed: int = 0

    def task_took(self, steps: int) -> None:
        """Note a finished task's length; it is trusted once two in a row agree."""
        self.steps = steps if steps == self.previous_steps else None
        self.previous_steps = steps


@dataclass(slots=True)
class Candidate:
    """What may be a parameter's updated tensor: the user's, weakly, and its value.

    ``cut`` where the gradient in it was detached: then it is first order whatever the graph was.
    """

    tensor: weakref.ref[Tensor]
    value: Tensor
    cut: bool = False


@dataclass
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
        written: values after the last in-place update.
    versions: the parameters' own counts of in-place changes at that time.
        escaped: whether a gradient left torch (``.numpy()``), where it cannot be followed.
        followed: whether the function mode was on for it.
        complete: whether it was followed no further than to the update, not to its first use.
        width: tasks batched by vmap.
        carried: leaves with the ``.grad`` that was there before a backward.
        task: the task it goes on with, where it was taken of that task's fast weights.
        named: otherwise, the model its inputs belong to and their positions in it.
    of_base: whether its inputs are the base of earlier tasks.
    origins: what its inputs were deep-copied from, where they all were.
    """

    site: int
    function: str
    inputs: list[weakref.ref[Tensor]]
    before: list[Tensor]
    gradients: list[Tensor | None]
    loss: Number
    loss_of: weakref.ref[Tensor] | None
    forwards: Forwards
    learned: Learned
    flags: int = 0
    candidates: list[list[Candidate]] = field(default_factory=list)
    writes: list[int] = field(default_factory=list)
    used: dict[int, int] = field(default_factory=dict)
    written: dict[int, Tensor] = field(default_factory=dict)
    versions: dict[int, int] = field(default_factory=dict)
    escaped: bool = False
    followed: bool = False
    complete: bool = False
    width: int = 1
    carried: list[tuple[weakref.ref[Tensor], Tensor]] = field(default_factory=list)
    task: Task | None = None
    named: tuple[KnownModel, list[int]] | None = None
    of_base: bool = False
    origins: list[weakref.ref[Tensor]] | None = None

    def __post_init__(self) -> None:
        missing = len(self.inputs) - len(self.candidates)
        self.candidates += [[] for _ in range(missing)]
        self.writes += [0] * missing

    @property
    def updated(self) -> bool:
        """Whether anything looks like an update so far."""
        return any(self.writes) or any(self.candidates)

    @property
    def stands(self) -> bool:
        """Whether nothing was written into the parameters since their update."""
        tensors = [reference() for reference in self.inputs]
        return bool(self.versions) and all(
            tensor is None or tensor._version == self.versions.get(index)
            for index, tensor in enumerate(tensors)
        )

    def is_input(self, tensor: Tensor) -> int | None:
        """Which input ``tensor`` is, by identity."""
        for index, reference in enumerate(self.inputs):
            if reference() is tensor:
                return index
        return None


class Follower(TorchFunctionMode):
    """On from a gradient call until its update is complete; then it only passes through."""

    def __init__(self, guard: Guard) -> None:
        super().__init__()
        self._guard = guard
        self._pending: Pending | None = None
        self._tags: dict[int, tuple[weakref.ref[Tensor], frozenset[int], frozenset[int]]] = {}
        self._cut: set[int] = set()
        self._storages: dict[int, list[int]] = {}
        self._pushed = False
        self._handling = 0

    def follow(self, pending: Pending, gradients: Sequence[Tensor | None]) -> None:
        """Start (or go on) following ``pending``; ``gradients`` are the user's own tensors.

        They are those of the last call: where there is one a parameter, of the last inputs.
        """
        if self._pending is not pending:
            self._pending, self._tags, self._storages = pending, {}, {}
            self._cut = set()
        for index, reference in enumerate(pending.inputs):
            tensor = reference()
            if tensor is not None:
                self._tag(tensor, frozenset((index,)), frozenset())
                pointer = _storage(tensor)
                if pointer:
                    self._storages.setdefault(pointer, []).append(index)
        for index, gradient in enumerate(gradients, len(pending.inputs) - len(gradients)):
            if gradient is not None:
                self._tag(gradient, frozenset(), frozenset((index,)))
        if not self._pushed and not _get_current_function_mode_stack():  # type: ignore[no-untyped-call]
            # Under a mode of the user's ours could be popped in its place: then identity decides.
            self.__enter__()  # type: ignore[no-untyped-call]
            self._pushed = True
        pending.followed = pending.followed or self._pushed

    def stop(self) -> None:
        """Forget what was followed, and leave the mode stack if we are on top of it."""
        self._forget()
        if self._pushed and not self._handling:
            # (While it handles a call torch has taken it off the stack, and will put it back.)
            stack = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
            if stack and stack[-1] is self:
                self.__exit__(None, None, None)
                self._pushed = False
            elif self not in stack:
                self._pushed = False

    def _forget(self) -> None:
        """Look at nothing more; the mode, if it is on, only passes through."""
        self._pending, self._tags, self._storages = None, {}, {}
        self._cut = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the user's operation, then look at where it leads."""
        self._handling += 1
        try:
            result = func(*args, **(kwargs or {}))
        finally:
            self._handling -= 1
        pending = self._pending
        if pending is None or torch.compiler.is_compiling() or not self._guard.watching:
            return result
        if self._guard.state.gradient or not self._concerns(func, args, kwargs):
            return result
        with self._guard.work():
            self._look(pending, func, args, kwargs or {}, result)
            if _is_complete(pending):
                pending.complete = True
                self._forget()
        return result

    def _concerns(self, func: Any, args: Any, kwargs: Any) -> bool:
        """Whether an operation can matter: most of a forward's neither take nor write our own."""
        tags = self._tags
        for arg in args:
            if id(arg) in tags or type(arg) in (list, tuple):
                return True
        return bool(kwargs) or _is_in_place(_name(func), {})

    def _look(self, pending: Pending, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        name = _name(func)
        if name in _UNRELATED:
            return
        if name.startswith("_foreach"):
            self._foreach(pending, name, args, result)
            return
        parameters: frozenset[int] = frozenset()
        gradients: frozenset[int] = frozenset()
        # What is overwritten does not matter to the value that comes out, only what it is made of.
        sources = args[1:] if name in _OVERWRITES else args
        cut = name in _DETACHING or not self._guard.differentiable
        for tensor in _tensors(sources, kwargs):
            tag = self._tags.get(id(tensor))
            if tag is not None and tag[0]() is tensor:
                parameters, gradients = parameters | tag[1], gradients | tag[2]
                cut |= bool(tag[2]) and id(tensor) in self._cut
                if name in _WEIGHT_OPERATIONS:
                    self._used(pending, tensor)
        if _is_in_place(name, kwargs) and args and isinstance(args[0], Tensor):
            self._written(pending, args[0], name, parameters, gradients)
        if not (parameters or gradients) or name in _WEIGHT_OPERATIONS:
            return  # what comes out of a weight operation is an activation, not a parameter
        if gradients and not parameters and name in _CLIPPING and isinstance(args[0], Tensor):
            active = name.endswith("_") or not torch.equal(plain(result), plain(args[0]))
            pending.flags |= FLAGS["clippable"] | (FLAGS["clipped"] if active else 0)
        if gradients and name in ("numpy", "tolist", "__array__"):
            pending.escaped = True
        for tensor in _results(result):
            if cut and gradients:
                self._cut.add(id(tensor))
            self._made(pending, tensor, parameters, gradients)

    def _foreach(self, pending: Pending, name: str, args: Any, result: Any) -> None:
        lists = [arg for arg in args if isinstance(arg, list | tuple)]
        if not lists:
            return
        in_place = name.endswith("_")
        made = result if isinstance(result, list | tuple) else ()
        for position, first in enumerate(lists[0]):
            parameters: frozenset[int] = frozenset()
            gradients: frozenset[int] = frozenset()
            for members in lists:
                tensor = members[position] if position < len(members) else None
                tag = self._tags.get(id(tensor))
                if tag is not None and tag[0]() is tensor:
                    parameters, gradients = parameters | tag[1], gradients | tag[2]
            if in_place and isinstance(first, Tensor):
                self._written(pending, first, name, parameters, gradients)
            elif position < len(made) and isinstance(made[position], Tensor):
                self._made(pending, made[position], parameters, gradients)

    def _written(
        self,
        pending: Pending,
        target: Tensor,
        name: str,
        parameters: frozenset[int],
        gradients: frozenset[int],
    ) -> None:
        """``target`` was overwritten: an update if its memory is a parameter's."""
        index = pending.is_input(target) if name == "data.__set__" else None
        if index is None:
            index = self._parameter_at(pending, target)
        if index is not None and self._updates(pending, index, name, gradients):
            pending.writes[index] += 1
            # Read now: the next thing to happen may be a restore of the base's weights.
            pending.written[index] = batched(target, pending.width).detach().clone()
            parameter = pending.inputs[index]()
            if parameter is not None:
                pending.versions[index] = parameter._version
        self._tag(target, parameters, gradients)

    def _parameter_at(self, pending: Pending, target: Tensor) -> int | None:
        """Whose memory ``target`` is; several parameters may be views of one vector."""
        indices = self._storages.get(_storage(target), [])
        if len(indices) == 1:
            return indices[0]
        address = plain(target).data_ptr() if indices else 0
        for index in indices:
            tensor = pending.inputs[index]()
            if tensor is not None and plain(tensor).data_ptr() == address:
                return index
        return None

    def _updates(self, pending: Pending, index: int, name: str, gradients: frozenset[int]) -> bool:
        """Whether a write is (part of) the update, and not a restore of older values."""
        if name in _OVERWRITES and pending.writes[index]:
            return False  # the update is complete: this restores or moves the weights
        if gradients or pending.escaped:
            return True
        return bool(pending.writes[index])

    def _made(
        self,
        pending: Pending,
        tensor: Tensor,
        parameters: frozenset[int],
        gradients: frozenset[int],
    ) -> None:
        if not parameters and not gradients:
            return
        self._tag(tensor, parameters, gradients)
        if self._parameter_at(pending, tensor) is not None:
            return  # a view or an alias of the parameter itself
        for index in parameters & gradients:
            before = pending.before[index]
            known = pending.candidates[index]
            same = tensor.shape == (before.shape if pending.width == 1 else before.shape[1:])
            same |= tensor.shape == before.shape
            if same and not any(
                candidate.tensor() is tensor or _rearranged(candidate, tensor)
                for candidate in known
            ):
                value = batched(tensor, pending.width).detach()
                known.append(Candidate(weakref.ref(tensor), value, id(tensor) in self._cut))

    def _used(self, pending: Pending, tensor: Tensor) -> None:
        for index, candidates in enumerate(pending.candidates):
            for position, candidate in enumerate(candidates):
                if candidate.tensor() is tensor or _rearranged(candidate, tensor):
                    pending.used.setdefault(index, position)

    def _tag(self, tensor: Tensor, parameters: frozenset[int], gradients: frozenset[int]) -> None:
        known = self._tags.get(id(tensor))
        if known is not None and known[0]() is tensor:
            parameters, gradients = parameters | known[1], gradients | known[2]
        self._tags[id(tensor)] = (weakref.ref(tensor), parameters, gradients)


def _rearranged(candidate: Candidate, tensor: Tensor) -> bool:
    """Whether a tensor is a candidate's own memory in another order: a square weight transposed."""
    value = candidate.value
    if value.dim() < 2 or tensor.dim() != value.dim() or tensor.layout is not torch.strided:
        return False
    return tensor.stride() != value.stride() and _storage(tensor) == _storage(value)


def _is_complete(pending: Pending) -> bool:
    """Whether every candidate that was right the last times at this line has been made."""
    learned = pending.learned
    if learned.confirmed < _TRUSTED or not learned.functional or learned.candidates is None:
        return False
    if len(learned.candidates) != len(pending.candidates) or any(pending.writes):
        return False
    return all(
        len(candidates) > expected or gradient is None
        for candidates, expected, gradient in zip(
            pending.candidates, learned.candidates, pending.gradients, strict=True
        )
    )


def _name(func: Any) -> str:
    """Name of an operation; property accesses say which property (``grad.__set__``)."""
    name: str = getattr(func, "__name__", "")
    if name in ("__get__", "__set__"):
        name = f"{getattr(func.__self__, '__name__', '')}.{name}"
    return name


def _is_in_place(name: str, kwargs: dict[str, Any]) -> bool:
    if name in _IN_PLACE_NAMES:
        return True
    return name.endswith("_") and not name.endswith("__") and name != "requires_grad_"


def _tensors(args: Iterable[Any], kwargs: dict[str, Any]) -> Iterable[Tensor]:
    for arg in (*args, *kwargs.values()):
        if isinstance(arg, Tensor):
            yield arg
        elif isinstance(arg, list | tuple):
            for member in arg:
                if isinstance(member, Tensor):
                    yield member


def _results(result: Any) -> Iterable[Tensor]:
    if isinstance(result, Tensor):
        return (result,)
    if isinstance(result, list | tuple):
        return [member for member in result if isinstance(member, Tensor)]
    return ()


def _storage(tensor: Tensor) -> int:
    """Address of the memory behind a tensor; 0 where it has none of its own."""
    try:
        return plain(tensor).untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # sparse, meta, or a wrapper without storage
        return 0
