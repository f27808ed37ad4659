"""Which statistics BatchNorm normalises with, changed at the function all of them call."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakTensorKeyDictionary

from divergence_probe.observe.interventions.base import Context, Intervention

_MOST_GROUPS = 8
_FEWEST_VALUES = 16
#: input, running_mean, running_var, weight, bias, training, momentum, eps
_Call = list[Any]


def _swap(context: Context, change: Callable[[_Call], Tensor | None]) -> None:
    """Let ``change`` edit the arguments of every ``F.batch_norm`` call, or give the result."""

    def make(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
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
            # The instrument behind us finds the calling module in our frame, under this name.
            self = sys._getframe(2).f_locals.get("self")
            call = [input, running_mean, running_var, weight, bias, training, momentum, eps]
            result = change(call)
            if result is None:
                result = original(*call)
            del self
            return result

        return batch_norm

    context.patches.swap_code(F.batch_norm, make)


def _adapting(context: Context) -> bool:
    """Whether a forward may belong to an inner loop: a frozen feature extractor's does not."""
    return torch.is_grad_enabled() or bool(context.session.open)


def _values(data: Tensor) -> int:
    """Values each channel is normalised over."""
    return data.numel() // max(data.shape[1] if data.dim() > 1 else 1, 1)


class BatchStatistics(Intervention):
    """Eval-mode BatchNorm normalises with the batch's own statistics; no buffer moves."""

    name = "batch-statistics"
    description = "batch statistics in place of running statistics"

    def install(self, context: Context) -> None:
        """Change calls in eval mode."""

        def change(call: _Call) -> None:
            if not call[5] and call[1] is not None and _values(call[0]) > 1 and _adapting(context):
                call[1] = call[2] = None
                call[5] = True

        _swap(context, change)


class RecalibratedStatistics(Intervention):
    """Running statistics are estimated anew on the first batch each set of buffers meets.

    higher gives every task buffers of its own, so there it is once a task.
    """

    name = "recalibrated-statistics"
    description = "running statistics re-estimated on the support set's first batch"

    def install(self, context: Context) -> None:
        """Change calls in eval mode."""
        estimates = WeakTensorKeyDictionary()

        def change(call: _Call) -> None:
            data, mean = call[0], call[1]
            if call[5] or mean is None or _values(data) < 2 or not _adapting(context):
                return
            if mean not in estimates:
                axes = [axis for axis in range(data.dim()) if axis != 1]
                variance, centre = torch.var_mean(data.detach(), dim=axes)
                estimates[mean] = (centre, variance)
            call[1], call[2] = estimates[mean]

        _swap(context, change)


class GroupNormalization(Intervention):
    """GroupNorm in place of train-mode BatchNorm: nothing depends on the batch."""

    name = "group-normalization"
    description = "GroupNorm in place of train-mode BatchNorm"

    def install(self, context: Context) -> None:
        """Change calls in train mode."""

        def change(call: _Call) -> Tensor | None:
            data = call[0]
            if not call[5] or not _adapting(context):
                return None
            return F.group_norm(data, _groups(data), call[3], call[4], call[7])

        _swap(context, change)


def _groups(data: Tensor) -> int:
    """As many groups as leave each enough values: a few would be as bad as a tiny batch."""
    groups = math.gcd(data.shape[1], _MOST_GROUPS)
    while groups > 1 and data[0].numel() // groups < _FEWEST_VALUES:
        groups //= 2
    return groups


class ClonedBuffers(Intervention):
    """Every task normalises with copies of the base's buffers, gone when it ends.

    Of a hand-written loop the end of a task is known only once the next one has taken its first
    gradient; that task's first forward then moved copies that are gone, which is the inner loop's
    own. What moved before an optimizer step with no task since is ordinary training: it is kept.
    """

    name = "cloned-buffers"
    description = "BatchNorm buffers of the base cloned for each task"

    def __init__(self) -> None:
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}

    def install(self, context: Context) -> None:
        """Hand out copies in train mode (and to evaluations after it) until the task ends."""
        session = context.session

        def change(call: _Call) -> None:
            if call[1] is None or not (call[5] or id(call[1]) in self._copies):
                return
            if not _adapting(context):
                self._keep()  # statistics are being trained, outside of any task
                return
            for position in (1, 2):
                buffer = call[position]
                if buffer.grad_fn is None:
                    copy = (buffer, buffer.detach().clone())
                    call[position] = self._copies.setdefault(id(buffer), copy)[1]

        def finish(original: Callable[..., None]) -> Callable[..., None]:
            def finish_task(task: Any) -> None:
                original(task)
                self._copies.clear()

            return finish_task

        def after_step(optimizer: Any, args: Any, kwargs: Any) -> None:
            if not context.at_inner_step() and not session.open:
                self._keep()

        _swap(context, change)
        context.patches.set_attribute(session, "finish_task", finish)
        context.patches.add_undo(register_optimizer_step_post_hook(after_step).remove)

    def _keep(self) -> None:
        for buffer, copy in self._copies.values():
            buffer.data.copy_(copy)  # through .data: graphs that saved the buffer stay valid
        self._copies.clear()
