"""torch.optim, through its global step hooks: the outer optimizer, and inner ones in place."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from divergence_probe.observe.models import KnownModel
from divergence_probe.observe.patching import Patches
from divergence_probe.observe.session import Session


def install(patches: Patches, session: Session) -> None:
    """Watch every ``torch.optim`` step."""
    watch = _Optimizers(session)
    patches.add_undo(register_optimizer_step_pre_hook(watch.before).remove)
    patches.add_undo(register_optimizer_step_post_hook(watch.after).remove)


class _Optimizers:
    """Steps of optimizers; those that move the base of earlier tasks are outer steps."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._pending: tuple[Any, ...] | None = None

    def before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Keep what the step is about to overwrite."""
        guard = self._session.guard
        if not guard.watching:
            return
        with guard.work():
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            known = self._base(parameters)
            if known is None:
                return
            current = _aligned(known, parameters)
            self._pending = (
                optimizer,
                known,
                current,
                [p.detach().clone() if p is not None else None for p in current],
                [p.grad.detach().clone() if p is not None and p.grad is not None else None
                 for p in current],
                self._session.sites.here(),
            )

    def after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """The outer step is complete."""
        pending, self._pending = self._pending, None
        guard = self._session.guard
        if pending is None or pending[0] is not optimizer or not guard.watching:
            return
        with guard.work():
            _, known, current, before, gradients, site = pending
            self._session.outer_step(
                known,
                before,
                [p.detach().clone() if p is not None else None for p in current],
                gradients,
                learning_rate=_largest_rate(optimizer),
                site=site,
                optimizer=type(optimizer).__name__,
            )

    def _base(self, parameters: list[Tensor]) -> KnownModel | None:
        """The base of an earlier task that these parameters belong to."""
        for parameter in parameters:
            found = self._session.models.find(parameter)
            if found is not None and found[0] in self._session.bases:
                return found[0]
        return None


def _aligned(known: KnownModel, parameters: list[Tensor]) -> list[Tensor | None]:
    """The optimizer's parameters in the model's order; None for those it does not step."""
    stepped = {id(parameter): parameter for parameter in parameters}
    references = (reference() for reference in known.parameters)
    return [stepped.get(id(p)) if p is not None else None for p in references]


def _largest_rate(optimizer: Optimizer) -> float | None:
    rates = [group["lr"] for group in optimizer.param_groups if "lr" in group]
    return max((float(rate) for rate in rates), default=None)
