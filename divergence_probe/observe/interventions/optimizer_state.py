"""What optimizers and gradients carry from one task into the next, taken away."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from divergence_probe.observe.interventions.base import Context, Intervention
from divergence_probe.observe.tensors import leaves


def _fresh(state: dict[str, Any], group: dict[str, Any]) -> dict[str, Any]:
    """One parameter's state as a new optimizer has it; Adagrad fills its own in at once."""
    if "sum" not in state:
        return {}
    start = float(group.get("initial_accumulator_value", 0.0))
    step = state["step"]
    return {
        "step": torch.zeros_like(step) if isinstance(step, Tensor) else 0,
        "sum": torch.full_like(state["sum"], start),
    }


class FreshOptimizerState(Intervention):
    """Every task begins with a new inner optimizer's state.

    An in-place optimizer's task begins where its parameters are no longer what it left.
    """

    name = "fresh-optimizer-state"
    description = "fresh optimizer state for every task"

    def install(self, context: Context) -> None:
        """Cover higher, TorchOpt's meta-optimizers and ``torch.optim``."""
        context.when_imported("higher", lambda: self._higher(context))
        context.when_imported("torchopt", lambda: self._torchopt(context))
        self._torch_optim(context)

    def _higher(self, context: Context) -> None:
        import higher.optim

        def begin(original: Callable[..., None]) -> Callable[..., None]:
            def __init__(self_: Any, other: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
                kept = dict(other.state)
                try:
                    groups = [(p, group) for group in other.param_groups for p in group["params"]]
                    fresh = {p: _fresh(kept[p], group) for p, group in groups if p in kept}
                    other.state = defaultdict(dict, {p: s for p, s in fresh.items() if s})
                    original(self_, other, *args, **kwargs)
                finally:
                    other.state = defaultdict(dict, kept)

            return __init__

        context.patches.set_attribute(higher.optim.DifferentiableOptimizer, "__init__", begin)

    def _torchopt(self, context: Context) -> None:
        import torchopt.optim.meta.base as meta
        from torchopt.typing import UninitializedState

        left: weakref.WeakKeyDictionary[Any, list[int]] = weakref.WeakKeyDictionary()

        def step(original: Callable[..., Any]) -> Callable[..., Any]:
            def step(self_: Any, loss: Tensor) -> Any:
                if left.get(self_) != _held(self_):
                    self_.state_groups[:] = [UninitializedState() for _ in self_.state_groups]
                result = original(self_, loss)
                left[self_] = _held(self_)
                return result

            return step

        context.patches.set_attribute(meta.MetaOptimizer, "step", step)

    def _torch_optim(self, context: Context) -> None:
        left: weakref.WeakKeyDictionary[Any, list[Tensor]] = weakref.WeakKeyDictionary()

        def before(optimizer: Any, args: Any, kwargs: Any) -> None:
            if not context.at_inner_step():
                return
            now = [p.detach() for group in optimizer.param_groups for p in group["params"]]
            known = left.get(optimizer)
            if known is not None and all(map(torch.equal, known, now)):
                return
            for group in optimizer.param_groups:
                for p in group["params"]:
                    if p in optimizer.state:
                        optimizer.state[p] = _fresh(optimizer.state[p], group)

        def after(optimizer: Any, args: Any, kwargs: Any) -> None:
            if context.at_inner_step():
                left[optimizer] = [
                    p.detach().clone() for group in optimizer.param_groups for p in group["params"]
                ]

        context.before_steps(before)
        context.patches.add_undo(register_optimizer_step_post_hook(after).remove)


def _held(optimizer: Any) -> list[int]:
    return [
        id(tensor)
        for group in optimizer.param_containers_groups
        for container in group
        for tensor in container.values()
    ]


class ClearedGradients(Intervention):
    """``.grad`` is empty before the backward of every inner step.

    Which backward that is shows where an inner step follows it; several backwards at one line
    before one step (micro-batches) are left to add up.
    """

    name = "cleared-gradients"
    description = "gradients cleared before every inner backward"

    def __init__(self) -> None:
        self._inner: set[str | None] = set()
        self._last: str | None = None
        self._stepped = True

    def install(self, context: Context) -> None:
        """Clear before an inner backward, and after an inner optimizer's step."""
        sites = context.session.sites
        self._inner.update(context.sites)

        def backward(original: Callable[..., Any]) -> Callable[..., Any]:
            def call(tensors: Any, *args: Any, **kwargs: Any) -> Any:
                site = sites.name(sites.here())
                by_hand = site in context.sites
                if site in self._inner and (by_hand or self._stepped or site != self._last):
                    roots = (tensors,) if isinstance(tensors, Tensor) else tuple(tensors)
                    for leaf in leaves(roots):
                        leaf.grad = None
                self._last, self._stepped = site, False
                return original(tensors, *args, **kwargs)

            return call

        def after(optimizer: Any, args: Any, kwargs: Any) -> None:
            if not context.at_inner_step():
                return
            self._inner.add(self._last)
            self._stepped = True
            for group in optimizer.param_groups:
                for p in group["params"]:
                    p.grad = None

        context.patches.swap_code(torch.autograd.backward, backward)
        context.patches.add_undo(register_optimizer_step_post_hook(after).remove)
