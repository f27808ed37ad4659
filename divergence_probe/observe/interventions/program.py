"""Features of torch around the inner loop, switched off or made uniform."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
import torch.utils.checkpoint
from torch import nn

from divergence_probe.observe.interventions.base import Context, Intervention


class NoCheckpointing(Intervention):
    """Checkpointed regions run once, as if they were not."""

    name = "no-checkpointing"
    description = "activation checkpointing switched off"

    def install(self, context: Context) -> None:
        """Replace what both kinds of ``checkpoint`` are made of."""

        def direct(function: Any, preserve: bool, *args: Any) -> Any:
            return function(*args)

        def plain(original: Any) -> Callable[..., Iterator[None]]:
            def once(*args: Any, **kwargs: Any) -> Iterator[None]:
                yield

            return once

        checkpoint = torch.utils.checkpoint
        context.patches.set_attribute(checkpoint, "_checkpoint_without_reentrant_generator", plain)
        without: Any = SimpleNamespace(apply=direct)
        context.patches.set_attribute(checkpoint, "CheckpointFunction", lambda original: without)


class Uncompiled(Intervention):
    """Nothing is compiled."""

    name = "uncompiled"
    description = "torch.compile switched off"

    def install(self, context: Context) -> None:
        """``torch.compile`` gives back what it gets, ``Module.compile`` does nothing."""

        def function(original: Any) -> Callable[..., Any]:
            def compile(model: Any = None, **kwargs: Any) -> Any:  # noqa: A001 - torch's name
                return (lambda wrapped: wrapped) if model is None else model

            return compile

        def method(original: Any) -> Callable[..., None]:
            def compile(self: nn.Module, *args: Any, **kwargs: Any) -> None:  # noqa: A001
                return None

            return compile

        context.patches.swap_code(torch.compile, function)
        context.patches.set_attribute(nn.Module, "compile", method)


class OneMode(Intervention):
    """Train mode in every phase: ``.eval()`` does nothing."""

    name = "one-mode"
    description = "train mode in every phase, .eval() ignored"

    def install(self, context: Context) -> None:
        """Change ``nn.Module.train``, which ``eval`` calls."""

        def make(original: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
            def train(self: nn.Module, mode: bool = True) -> nn.Module:
                return original(self, True)

            return train

        context.patches.set_attribute(nn.Module, "train", make)


class ConnectedToBase(Intervention):
    """higher keeps the graph from the query's loss to the base's weights."""

    name = "connected-to-base"
    description = "copy_initial_weights=False and track_higher_grads=True"

    def install(self, context: Context) -> None:
        """Change what ``monkeypatch`` and the differentiable optimizers are given."""
        context.when_imported("higher", lambda: self._higher(context))

    def _higher(self, context: Context) -> None:
        import higher.optim
        import higher.patch

        def patch(original: Callable[..., Any]) -> Callable[..., Any]:
            def monkeypatch(module: Any, device: Any = None, **kwargs: Any) -> Any:
                kwargs |= {"copy_initial_weights": False, "track_higher_grads": True}
                return original(module, device, **kwargs)

            return monkeypatch

        def begin(original: Callable[..., None]) -> Callable[..., None]:
            def __init__(self_: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
                original(self_, *args, **{**kwargs, "track_higher_grads": True})

            return __init__

        context.patches.swap_code(higher.patch.monkeypatch, patch)
        context.patches.set_attribute(higher.optim.DifferentiableOptimizer, "__init__", begin)
