"""Normalisation and dropout as they really run: which statistics were used, over how many values.

Both are seen at the function all of torch calls (``F.batch_norm``, ``F.dropout``), so a module, a
library's copy of it and a hand-written functional net are seen alike, and a net without them pays
nothing. (A global forward hook costs every module call, about 3 microseconds each.)
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from time import perf_counter as clock
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from divergence_probe.observe.at_hand import waits_for_nothing
from divergence_probe.observe.capture import (
    DropoutCall,
    Forwards,
    NormalizationCall,
    next_order,
)
from divergence_probe.observe.guard import BACKWARD_THREADS
from divergence_probe.observe.patching import Patches
from divergence_probe.observe.session import Session
from divergence_probe.observe.task import Task
from divergence_probe.observe.tensors import (
    are_plain,
    in_plain_torch,
    is_tracing,
    is_unreal,
    physical,
    plain,
)

# this function <- handler <- forwarding stub in place of the function's code <- module.forward
_CALLER = 3


def install(patches: Patches, session: Session) -> None:
    """Watch ``F.batch_norm`` and the dropout functions."""
    patches.swap_code(F.batch_norm, lambda original: _batch_norm(session, original))
    for dropout in (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout):
        patches.swap_code(dropout, lambda original: _dropout(session, original))


def _batch_norm(session: Session, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    guard, inside, is_compiling = session.guard, session.guard.inside(), torch.compiler.is_compiling
    threads, is_grad_enabled = guard.threads, torch.is_grad_enabled

    def batch_norm(
        input: Tensor,  # noqa: A002 - the name is torch's
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        call = (input, running_mean, running_var, weight, bias, training, momentum, eps)
        if is_compiling() or is_tracing() or not guard.active or (state := threads.state).away:
            return original(*call)
        if (state.gradient or BACKWARD_THREADS) and state.is_in_gradient():
            with state:  # beforehand: checkpointing stops a recomputation by an exception
                _recomputed(session, _calling_module(), training and running_mean is not None)
            return original(*call)
        if in_plain_torch() and are_plain((input, weight, running_mean)):
            # There is nothing to put aside: a step calls this once a layer.
            started = clock()
            before = None
            try:
                before = _statistics(running_mean, running_var)
            except Exception as error:
                guard.fail(error)
            guard.spent += clock() - started
            result = original(*call)
            started = clock()
            try:
                after = _statistics(running_mean, running_var) if training else None
                _note(session, _calling_module(), call, before, after, is_grad_enabled())
            except Exception as error:
                guard.fail(error)
            guard.spent += clock() - started
            return result
        if is_unreal():
            return original(*call)
        with state:
            before = _statistics(running_mean, running_var)
        with inside:
            result = original(*call)
        with state:
            after = _statistics(running_mean, running_var) if training else None
            _note(session, _calling_module(), call, before, after, guard.differentiable)
        return result

    return batch_norm


def _note(
    session: Session,
    module: nn.Module | None,
    call: tuple[Any, ...],
    before: Tensor | None,
    after: Tensor | None,
    differentiable: bool,
) -> None:
    """Write down one finished ``F.batch_norm`` call."""
    data, running_mean, _, weight, _, training, momentum, _ = call
    data, width = physical(data)
    if width > 1:  # all tasks of a vmap, as one batch
        data = data.flatten(0, 1)
    # (the wrapper that a transform hands on is gone when the gradient is there)
    weight = plain(weight) if weight is not None else None
    batch = None
    channels = data.shape[1] if data.dim() > 1 else 1
    owner = _owner(session, module)
    forwards = _forwards(session, owner)
    if not training and _first_of_phase(forwards, module, weight):
        # Needed to judge the running statistics, and costs a pass: once a phase, not every step.
        batch = _batch_statistics(data)
    name = owner.module_names.get(id(module)) if owner and owner.module_names else None
    nameless = running_mean if not name else None  # its statistics may tell what layer it is
    forwards.normalizations.append(
        NormalizationCall(
            module=weakref.ref(module) if module is not None else None,
            weight=weakref.ref(weight) if weight is not None else None,
            training=bool(training),
            momentum=momentum if isinstance(momentum, float) else 0.0,
            before=before,
            after=after,
            batch=batch,
            values=data.numel() // max(width * channels, 1),
            batches=_counter(module),
            shared=running_mean is not None and session.models.is_base_buffer(running_mean),
            buffers=id(running_mean) if running_mean is not None else 0,
            statistics=weakref.ref(nameless) if nameless is not None else None,
            known_as=session.layer_names.of_statistics(nameless),
            name=name,
            order=next_order(),
            differentiable=differentiable,
        )
    )


def _statistics(mean: Tensor | None, variance: Tensor | None) -> Tensor | None:
    """A copy of running statistics, one after the other ``[2C]``; None where there are none."""
    if mean is None or variance is None:
        return None
    if mean.requires_grad or variance.requires_grad:
        mean, variance = mean.detach(), variance.detach()
    return torch.cat((_one_a_channel(mean), _one_a_channel(variance)))


def _one_a_channel(statistic: Tensor) -> Tensor:
    """Running statistics ``[C]``; the mean of them where each task of a vmap has its own."""
    value = physical(statistic)[0]
    return value if value.dim() < 2 else value.mean(0)


def _recomputed(session: Session, module: nn.Module | None, statistics_moved: bool) -> None:
    """A forward inside a backward: checkpointing runs it again, and statistics move again."""
    owner = _owner(session, module)
    if owner is None and session.open:
        owner = session.open[-1]
    names = owner.module_names if owner is not None and owner.module_names else {}
    known = session.models.owner(module) if module is not None else None
    layer = names.get(id(module)) or (known[1] if known else None)
    if statistics_moved and owner is not None and layer not in owner.recomputed:
        owner.recomputed.add(layer)
        session.event("recomputed", owner, session.sites.here(), layer=layer)


def _batch_statistics(data: Tensor) -> Tensor | None:
    """The batch's mean and variance per channel ``[2C]``; None for a single value a channel."""
    axes = [axis for axis in range(data.dim()) if axis != 1]
    if not axes or data.numel() <= data.shape[1]:
        return None
    variance, mean = torch.var_mean(data.detach().float(), dim=axes)
    return torch.cat((mean, variance))


def _first_of_phase(forwards: Forwards, module: nn.Module | None, weight: Tensor | None) -> bool:
    """Whether this layer was not called yet since the last gradient, or the last loss.

    (A query without a gradient ends in a loss; what runs after it is the next task's.)
    """
    since = forwards.losses[-1].order if forwards.losses else -1
    for call in forwards.normalizations:
        if call.order < since:
            continue
        if module is not None and call.module is not None and call.module() is module:
            return False
        if module is None and call.weight is not None and call.weight() is weight:
            return False
    return True


def _counter(module: nn.Module | None) -> int | Tensor | None:
    if module is None:
        return None
    counter = module._buffers.get("num_batches_tracked")  # an attribute of a module is dear
    if counter is None:
        counter = getattr(module, "num_batches_tracked", None)
        if not isinstance(counter, Tensor):
            return None
    counter = plain(counter)
    return int(counter.item()) if waits_for_nothing(counter) else counter.clone()


def _calling_module() -> nn.Module | None:
    """The module whose ``forward`` called the function, if one did."""
    module = sys._getframe(_CALLER).f_locals.get("self")
    return module if isinstance(module, nn.Module) else None


def _owner(session: Session, module: nn.Module | None) -> Task | None:
    """The open task whose fast model the module is part of."""
    if module is not None:
        for task in reversed(session.open):
            if task.module_names is not None and id(module) in task.module_names:
                return task
    return None


def _forwards(session: Session, owner: Task | None) -> Forwards:
    forwards = owner.forwards if owner is not None else session.loose.forwards
    forwards.trim()
    return forwards


def _dropout(session: Session, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    guard = session.guard

    def dropout(
        input: Tensor,  # noqa: A002 - the name is torch's
        p: float = 0.5,
        training: bool | None = None,
        inplace: bool = False,
    ) -> Tensor:
        if training is None:
            defaults: Any = original.__defaults__
            training = defaults[1]
        if torch.compiler.is_compiling() or not guard.watching:
            return original(input, p, training, inplace)
        with guard.inside():
            result = original(input, p, training, inplace)
        with guard.work():
            module = _calling_module()
            owner = _owner(session, module)
            active = bool(training) and p > 0
            name = owner.module_names.get(id(module)) if owner and owner.module_names else None
            reference = weakref.ref(module) if module is not None else None
            _forwards(session, owner).dropouts.append(
                DropoutCall(reference, active, p, name, next_order(), guard.differentiable)
            )
        return result

    return dropout
