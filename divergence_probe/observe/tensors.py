"""Small facts about tensors: what lies under functorch wrappers, which leaves a loss reaches."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from operator import call, is_
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import (
    get_unwrapped,
    is_batchedtensor,
    is_functorch_wrapped_tensor,
    maybe_get_bdim,
)
from torch.utils._pytree import tree_leaves

from divergence_probe.observe.mode_stack import height

_dispatch_modes = torch._C._len_torch_dispatch_stack
is_tracing = torch._C._get_tracing_state
are_transforms_active = torch._C._are_functorch_transforms_active
_dispatch_mode = torch._C._get_dispatch_mode
_CUDA, _captured = torch.version.cuda is not None, torch.cuda.is_current_stream_capturing
_PROXY, _FAKE = torch._C._TorchDispatchModeKey.PROXY, torch._C._TorchDispatchModeKey.FAKE

_TENSORS = frozenset((Tensor, torch.nn.Parameter))
_PLAIN = frozenset((Tensor, torch.nn.Parameter, str, float, int, bool, type(None)))


def in_plain_torch() -> bool:
    """Whether nothing stands between us and plain tensors: no mode of the user's, no transform."""
    return not (height() or are_transforms_active() or _dispatch_modes() or (_CUDA and _captured()))


def tensors_in(tree: Any) -> list[Tensor]:
    """The tensors among the leaves of a pytree, in order."""
    if type(tree) is dict:  # by far the most common, and pytrees walk slowly
        if _TENSORS.issuperset(map(type, tree.values())):
            return list(tree.values())
    elif type(tree) in (list, tuple):
        if len(tree) == 1 and type(tree[0]) is dict:
            return tensors_in(tree[0])
        if _TENSORS.issuperset(map(type, tree)):
            return list(tree)
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def is_unreal() -> bool:
    """Whether operations are written down, or only their shapes worked out (``make_fx``, export).

    There are no values then; ours would be written down as the user's. So it is while a graph of
    CUDA's is captured, and to wait for the device would end that.
    """
    return (
        _dispatch_mode(_PROXY) is not None
        or _dispatch_mode(_FAKE) is not None
        or (_CUDA and _captured())
    )


def are_plain(values: Iterable[object]) -> bool:
    """Whether there is no tensor of a class of the user's, whose handlers call us again."""
    return _PLAIN.issuperset(map(type, values))


def references(tensors: Sequence[Tensor | None]) -> list[weakref.ref[Tensor] | None]:
    """Weak references, None where there is no tensor."""
    try:
        return list(map(weakref.ref, tensors))  # type: ignore[arg-type]
    except TypeError:  # None among them
        return [weakref.ref(tensor) if tensor is not None else None for tensor in tensors]


def are(references: Sequence[weakref.ref[Tensor] | None], tensors: Sequence[Tensor]) -> bool:
    """Whether ``references`` are of these very tensors, in this order."""
    if len(references) != len(tensors):
        return False
    try:  # all of it in C: it is asked of every step
        return all(map(is_, map(call, references), tensors))  # type: ignore[arg-type]
    except TypeError:  # None among them
        return False


class TensorSet:
    """Tensors by identity (their ``==`` is element by element), while they live."""

    def __init__(self) -> None:
        self._references: dict[int, weakref.ref[Tensor]] = {}

    def __contains__(self, tensor: Tensor) -> bool:
        reference = self._references.get(id(tensor))
        return reference is not None and reference() is tensor

    def __len__(self) -> int:
        return len(self._references)

    def add(self, tensor: Tensor) -> None:
        """Keep ``tensor`` in mind until it is gone."""
        key = id(tensor)
        if key not in self._references:
            forget = self._references.pop
            self._references[key] = weakref.ref(tensor, lambda _: forget(key, None))

    def discard(self, tensor: Tensor) -> None:
        """Forget it, if it is there."""
        self._references.pop(id(tensor), None)


def identities(references: Iterable[weakref.ref[Tensor] | None]) -> set[int]:
    """``id`` of every tensor that is still there."""
    return {id(t) for r in references if r is not None and (t := r()) is not None}


def plain(tensor: Tensor) -> Tensor:
    """The tensor under every functorch wrapper: safe to keep and to measure."""
    while is_functorch_wrapped_tensor(tensor):
        tensor = get_unwrapped(tensor)
    return tensor


def physical(tensor: Tensor) -> tuple[Tensor, int]:
    """The plain tensor with its vmap dimensions moved to the front and merged, and their size.

    Returns:
        ``(tensor, 1)`` for a tensor no vmap has batched.
    """
    batched: list[int] = []
    while is_functorch_wrapped_tensor(tensor):
        inner = get_unwrapped(tensor)
        if is_batchedtensor(tensor):
            # Outer dimensions already moved to the front shift this one back.
            inner = inner.movedim(maybe_get_bdim(tensor), 0) if not batched else inner
            batched.append(inner.shape[0])
        tensor = inner
    if not batched:
        return tensor, 1
    return tensor, batched[0]


def batched(tensor: Tensor, width: int) -> Tensor:
    """The plain tensor with a task dimension of ``width`` first (none where ``width`` is 1)."""
    value, own = physical(tensor)
    if width == own:
        return value
    return value.unsqueeze(0).expand(width, *value.shape)


def address_of(tensor: Tensor) -> int:
    """Where its plain values begin in memory; 0 where it has none of its own."""
    try:
        return physical(tensor)[0].data_ptr()
    except (RuntimeError, NotImplementedError):  # sparse, meta, or a wrapper without storage
        return 0


def storage_of(tensor: Tensor) -> int:
    """Address of the memory behind a tensor; 0 where it has none of its own."""
    try:
        return plain(tensor).untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # sparse, meta, or a wrapper without storage
        return 0


def changes_of(tensor: Tensor) -> int:
    """Torch's count of its in-place changes; none is kept in inference mode."""
    try:
        return tensor._version
    except RuntimeError:
        return 0


def carries_graph(tensor: Tensor) -> bool:
    """Whether something outside can still differentiate through ``tensor``.

    A wrapper of vmap says no for what it wraps, and an outer ``grad`` is a wrapper further in.
    """
    while not tensor.requires_grad and is_functorch_wrapped_tensor(tensor):
        tensor = get_unwrapped(tensor)
    return tensor.requires_grad


def any_carries_graph(tensors: Sequence[Tensor | None]) -> bool:
    """Whether something outside can still differentiate through one of ``tensors``."""
    first = tensors[0] if tensors else None
    if first is not None and first.requires_grad:  # so it is with all of them, or with none
        return True
    return any(tensor is not None and carries_graph(tensor) for tensor in tensors)


def is_fresh(tensor: Tensor) -> bool:
    """Whether a tensor holds what unrelated parameters begin with: zeros, or ones."""
    return not bool(tensor.any()) or bool((tensor == 1).all())


def leaves(outputs: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    """The leaf tensors a backward from ``outputs`` accumulates gradients into, in forward order."""
    roots = (outputs,) if isinstance(outputs, Tensor) else outputs
    found: list[Tensor] = []
    stack: list[Any] = [root.grad_fn for root in roots if root.grad_fn is not None]
    found += [root for root in roots if root.grad_fn is None and root.requires_grad]
    seen = set(stack)
    while stack:
        node = stack.pop()
        variable = getattr(node, "variable", None)
        if variable is not None:
            found.append(variable)
            continue
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                stack.append(following)
    return found[::-1]


#: Operations that give the same values back: a parameter seen through them is still itself.
IDENTITIES = frozenset(
    {"CloneBackward0", "ToCopyBackward0", "AliasBackward0", "ViewBackward0", "UnsafeViewBackward0",
     "ReshapeAliasBackward0", "ExpandBackward0", "SqueezeBackward0", "UnsqueezeBackward0"}
)  # fmt: skip


def base_of(tensor: Tensor, depth: int = 3) -> Tensor | None:
    """The leaf a non-leaf parameter was cloned from, if a few identity-like steps lead to one.

    (Inside a vmap: which it was expanded from outside, once for each task.)
    """
    node: Any = plain(tensor).grad_fn
    for _ in range(depth):
        if node is None:
            return None
        variable = getattr(node, "variable", None)
        if isinstance(variable, torch.Tensor):
            return variable if variable.shape == tensor.shape else None
        if node.name() not in IDENTITIES:
            return None  # p - lr * g leads back to p, too, where g is a constant
        following = [n for n, _ in node.next_functions if n is not None]
        if len(following) != 1:
            return None
        node = following[0]
    return None
