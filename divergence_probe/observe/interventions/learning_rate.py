"""A ten times smaller inner learning rate, wherever an inner step takes its size from."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._functorch import eager_transforms
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._pytree import tree_map_only

from divergence_probe.observe.interventions.base import Context, Intervention

FACTOR = 0.1


class _Thread(threading.local):
    library = 0


class SmallerLearningRate(Intervention):
    """Every inner learning rate times 0.1.

    Exact for higher, TorchOpt's meta-optimizers and ``torch.optim``. In a loop written by hand the
    inner gradient is scaled instead, which for plain descent is the same; with momentum it is too,
    and a hand-written Adam does not notice.
    """

    name = "learning-rate/10"
    description = "inner learning rate x 0.1"

    def __init__(self) -> None:
        self._thread = _Thread()

    def install(self, context: Context) -> None:
        """Scale rates where a library has them, gradients at the user's inner lines elsewhere."""
        context.when_imported("higher", lambda: self._higher(context))
        context.when_imported("torchopt", lambda: self._torchopt(context))
        self._torch_optim(context)
        self._gradients(context)

    def _higher(self, context: Context) -> None:
        import higher.optim

        def override(original: Callable[..., None]) -> Callable[..., None]:
            def _apply_override(self_: Any, values: Any) -> None:
                if "lr" in values:
                    values = {**values, "lr": [rate * FACTOR for rate in values["lr"]]}
                original(self_, values)

            return _apply_override

        def begin(original: Callable[..., None]) -> Callable[..., None]:
            def __init__(self_: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
                original(self_, *args, **kwargs)
                if "lr" not in (kwargs.get("override") or {}):
                    for group in self_.param_groups:
                        group["lr"] = group["lr"] * FACTOR

            return __init__

        optimizer = higher.optim.DifferentiableOptimizer
        context.patches.set_attribute(optimizer, "_apply_override", override)
        context.patches.set_attribute(optimizer, "__init__", begin)
        context.patches.set_attribute(optimizer, "step", self._as_library)

    def _torchopt(self, context: Context) -> None:
        import torchopt.optim.meta.base as meta

        def apply(original: Callable[..., Any]) -> Callable[..., Any]:
            def apply_updates(params: Any, updates: Any, **kwargs: Any) -> Any:
                scaled = tree_map_only(Tensor, lambda update: update * FACTOR, updates)
                return original(params, scaled, **kwargs)

            return apply_updates

        context.patches.set_attribute(meta, "apply_updates", apply)
        context.patches.set_attribute(meta.MetaOptimizer, "step", self._as_library)

    def _as_library(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """A library's own step: its gradients are not scaled on top."""

        def step(*args: Any, **kwargs: Any) -> Any:
            self._thread.library += 1
            try:
                return original(*args, **kwargs)
            finally:
                self._thread.library -= 1

        return step

    def _torch_optim(self, context: Context) -> None:
        rates: list[list[Any]] = []

        def before(optimizer: Any, args: Any, kwargs: Any) -> None:
            groups = optimizer.param_groups
            rates.append([group.get("lr") for group in groups] if context.at_inner_step() else [])
            for group, rate in zip(groups, rates[-1], strict=False):
                if rate is not None:
                    group["lr"] = rate * FACTOR

        def after(optimizer: Any, args: Any, kwargs: Any) -> None:
            for group, rate in zip(optimizer.param_groups, rates.pop(), strict=False):
                if rate is not None:
                    group["lr"] = rate

        context.before_steps(before)
        context.patches.add_undo(register_optimizer_step_post_hook(after).remove)

    def _gradients(self, context: Context) -> None:
        def scales() -> bool:
            return not self._thread.library and context.at_inner_step()

        def seeded(original: Callable[..., Any]) -> Callable[..., Any]:
            """``autograd.grad`` and ``backward``: the gradient that flows in is scaled."""

            def call(outputs: Any, *args: Any, **kwargs: Any) -> Any:
                name = "grad_outputs" if original.__name__ == "grad" else "grad_tensors"
                position = 1 if original.__name__ == "grad" else 0
                if not scales() or len(args) > position:
                    return original(outputs, *args, **kwargs)
                tensors = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
                given = kwargs.get(name)
                seeds = [given] if isinstance(given, Tensor) else given or [None] * len(tensors)
                kwargs[name] = [
                    (torch.ones_like(t) if seed is None else seed) * FACTOR
                    for t, seed in zip(tensors, seeds, strict=True)
                ]
                return original(tensors, *args, **kwargs)

            return call

        def transformed(original: Callable[..., Any]) -> Callable[..., Any]:
            def grad_and_value_impl(*args: Any) -> Any:
                gradients, value = original(*args)
                if scales():
                    gradients = tree_map_only(Tensor, lambda g: g * FACTOR, gradients)
                return gradients, value

            return grad_and_value_impl

        context.patches.swap_code(torch.autograd.grad, seeded)
        context.patches.swap_code(torch.autograd.backward, seeded)
        context.patches.set_attribute(eager_transforms, "grad_and_value_impl", transformed)
