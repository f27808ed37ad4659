"""TorchOpt: every ``MetaOptimizer.step`` is an inner step; its classic optimizers step the base.

A meta-optimizer puts new tensors into the user's own module, in place of the ones it was given. A
task goes on while the module holds the tensors the last step left there, and ends when
``recover_state_dict`` puts others in their place. BatchNorm buffers are the module's own.
The functional optimizers (``torchopt.sgd`` with ``apply_updates``) are seen as any loop is.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from divergence_probe.observe.capture import Forwards
from divergence_probe.observe.gradients import Taken, library_step
from divergence_probe.observe.models import KnownModel, fast_module_names
from divergence_probe.observe.optimizer_facts import Carried, OptimizerFacts
from divergence_probe.observe.optimizers import watching
from divergence_probe.observe.patching import Patches
from divergence_probe.observe.session import Session
from divergence_probe.observe.task import Task
from divergence_probe.record.schema import FLAGS

LIBRARY = "torchopt"


def install(patches: Patches, session: Session) -> None:
    """Watch TorchOpt's meta-optimizers, its classic optimizers and ``recover_state_dict``."""
    import torchopt.optim.base
    import torchopt.optim.meta.base
    import torchopt.utils

    meta = _MetaOptimizers(session)
    optimizer = torchopt.optim.meta.base.MetaOptimizer
    patches.set_attribute(optimizer, "add_param_group", meta.add_param_group)
    patches.set_attribute(optimizer, "step", meta.step)
    patches.swap_code(torchopt.utils.recover_state_dict, meta.recover)
    patches.swap_code(torchopt.utils.module_clone, lambda original: _clone(session, original))
    classic = _ClassicOptimizers(session)
    patches.set_attribute(torchopt.optim.base.Optimizer, "step", classic.step)


def _clone(session: Session, original: Callable[..., Any]) -> Callable[..., Any]:
    """``module_clone`` copies parameters by hand: note what of, as for a ``copy.deepcopy``."""

    def module_clone(target: Any, **options: Any) -> Any:
        result = original(target, **options)
        if isinstance(target, nn.Module) and session.guard.watching:
            with session.guard.work():
                origins = dict(target.named_parameters())
                for name, copy in result.named_parameters():
                    if copy.is_leaf and copy is not origins[name]:
                        session.models.note_copy(copy, origins[name])
                session.models.note_module_copy(result, target)
        return result

    return module_clone


@dataclass
class _Net:
    """The module behind a meta-optimizer; its tensors are read from the optimizer's containers."""

    module: weakref.ref[nn.Module] | None
    known: KnownModel
    prefixes: dict[int, str]

    def read(self, optimizer: Any) -> list[Tensor | None]:
        """The parameters as they are now, in the order of the model's layout."""
        result: list[Tensor | None] = [None] * len(self.known.layout.parameters)
        everything = [c for group in optimizer.param_containers_groups for c in group]
        if self.module is None:
            tensors = [t for c in everything for t in c.values() if isinstance(t, Tensor)]
            return [*tensors, *result][: len(result)]
        for container in everything:
            prefix = self.prefixes.get(id(container), "")
            for key, tensor in container.items():
                position = self.known.positions.get(f"{prefix}{key}")
                if position is not None and isinstance(tensor, Tensor):
                    result[position] = tensor
        return result


class _MetaOptimizers:
    """What is known of meta-optimizers; weak, so that nothing of the user's is kept alive."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.tasks: weakref.WeakKeyDictionary[Any, Task] = weakref.WeakKeyDictionary()
        self.nets: weakref.WeakKeyDictionary[Any, _Net] = weakref.WeakKeyDictionary()
        self.models: weakref.WeakKeyDictionary[nn.Module, KnownModel] = weakref.WeakKeyDictionary()
        self.versions: weakref.WeakKeyDictionary[Any, list[int]] = weakref.WeakKeyDictionary()

    def add_param_group(self, original: Callable[..., None]) -> Callable[..., None]:
        """Note the module a meta-optimizer moves: from here on only its containers show."""

        def add_param_group(self_: Any, module: nn.Module) -> None:
            original(self_, module)
            if self.session.guard.watching:
                with self.session.guard.work():
                    if len(self_.param_containers_groups) == 1:
                        self._note(self_, module)
                    else:  # several modules: no layout of one of them fits
                        self.nets[self_] = self._nameless(self_)

        return add_param_group

    def _note(self, optimizer: Any, module: nn.Module) -> _Net:
        known = self.models.get(module)
        if known is None:
            known = self.models[module] = self.session.models.register(module)
        prefixes = {
            id(child._parameters): f"{name}." if name else ""
            for name, child in module.named_modules()
        }
        net = self.nets[optimizer] = _Net(weakref.ref(module), known, prefixes)
        return net

    def _nameless(self, optimizer: Any) -> _Net:
        tensors = [
            tensor
            for group in optimizer.param_containers_groups
            for container in group
            for tensor in container.values()
            if isinstance(tensor, Tensor)
        ]
        known = self.session.models.nameless(tensors, [""] * len(tensors))
        return _Net(None, known, {})

    def _net(self, optimizer: Any) -> _Net:
        """The module of an optimizer; one made before the probe is found by its tensors."""
        net = self.nets.get(optimizer)
        if net is not None:
            return net
        groups = optimizer.param_containers_groups
        tensors = [t for c in groups[0] for t in c.values() if isinstance(t, Tensor)]
        found = self.session.models.find(tensors[0])
        known = found[0] if found else self.session.models.discover(tensors)
        module = known.model() if known is not None and known.model is not None else None
        if len(groups) > 1 or module is None:
            net = self.nets[optimizer] = self._nameless(optimizer)
            return net
        return self._note(optimizer, module)

    def step(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """One inner step."""

        def step(self_: Any, loss: Tensor) -> Any:
            guard = self.session.guard
            if not guard.watching:
                return original(self_, loss)
            with guard.work():
                net = self._net(self_)
                before = net.read(self_)
                task, forwards = self._task(self_, net, before, loss)
                site = self.session.sites.here()
            with library_step(guard) as taken:
                result = original(self_, loss)
            with guard.work():
                self._record(self_, task, before, net.read(self_), taken, loss, forwards, site)
            return result

        return step

    def _task(
        self, optimizer: Any, net: _Net, before: list[Tensor | None], loss: Tensor
    ) -> tuple[Task, Forwards]:
        """The task a step goes on with (or begins), and what ran forward for the step."""
        session = self.session
        task = self.tasks.get(optimizer)
        if task is not None and not task.ended and self._unchanged(optimizer, task, before):
            return task, task.forwards.split_for(loss, _none)
        forwards = session.loose.forwards.split_for(loss, _none)
        module = net.module() if net.module is not None else None
        for other in [t for t in session.open if t is task or _runs(t, module)]:
            # It is over, and the forward for this step was the first thing after it.
            forwards.extend(other.forwards.split_for(loss, _none))
            session.finish_task(other)
        carried = Carried.of(_state(optimizer))
        task = session.start_task(
            net.known,
            "torchopt",
            session.sites.here(),
            base=net.known,
            optimizer=type(optimizer).__name__,
            track_higher_grads=True,
            carried_steps=carried.steps,
            carried_state=carried.state,
            base_training=bool(module.training) if module is not None else None,
        )
        if module is not None:
            task.module_names = fast_module_names(module)
        self.tasks[optimizer] = task
        return task, forwards

    def _unchanged(self, optimizer: Any, task: Task, now: list[Tensor | None]) -> bool:
        """Whether the module still holds the tensors the last step left, not written since."""
        left = [reference() if reference is not None else None for reference in task.fast]
        same = all(a is b for a, b in zip(left, now, strict=True))
        return same and self.versions.get(optimizer) == _versions(now)

    def _record(
        self,
        optimizer: Any,
        task: Task,
        before: list[Tensor | None],
        after: list[Tensor | None],
        taken: Taken,
        loss: Tensor,
        forwards: Forwards,
        site: int,
    ) -> None:
        gradients = [taken.of(tensor) if tensor is not None else None for tensor in before]
        second_order = any(g is not None and g.requires_grad for g in gradients)
        last = task.last
        self.session.step(
            task,
            # Cloned, for the module is the user's own: a restore may write into its tensors.
            last.after if last is not None else _cloned(before),
            _cloned(after),
            [g.detach() if g is not None else None for g in gradients],
            loss=loss.detach(),
            learning_rate=learning_rate(optimizer.impl.update),
            site=site,
            forwards=forwards,
            flags=FLAGS["second_order"] if second_order else 0,
        )
        task.fast = [weakref.ref(t) if t is not None else None for t in after]
        self.versions[optimizer] = _versions(after)

    def recover(self, original: Callable[..., None]) -> Callable[..., None]:
        """``recover_state_dict`` of a module ends the task that ran in it."""

        def recover_state_dict(target: Any, state: Any) -> None:
            guard = self.session.guard
            if guard.watching and isinstance(target, nn.Module):
                with guard.work():
                    for task in [t for t in self.session.open if _runs(t, target)]:
                        self.session.finish_task(task)
            original(target, state)

        return recover_state_dict


class _ClassicOptimizers:
    """``torchopt.Adam(net.parameters())`` and kin: judged as ``torch.optim``'s are."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def step(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """One step, in place."""

        def step(self_: Any, closure: Any = None) -> Any:
            guard = self.session.guard
            if not guard.watching or guard.state.is_in_gradient():
                return original(self_, closure)
            watch = watching(self.session)
            with guard.work():
                parameters = [p for group in self_.param_groups for p in tree_leaves(group)]
                watch.begin(self_, _facts(self_), parameters)
            try:
                return original(self_, closure)
            finally:
                watch.end(self_)

        return step


def _facts(optimizer: Any) -> OptimizerFacts:
    return OptimizerFacts(
        type(optimizer).__name__,
        learning_rate(optimizer.impl.update),
        lambda: Carried.of(_state(optimizer)),
    )


def learning_rate(update: Any) -> float | Tensor | None:
    """The step size of a transformation's ``update``, or None where it follows a schedule.

    Transformations are closures over one another; the last link of every optimizer's chain is
    ``scale(-lr)``, whose closure holds the number.
    """
    code, closure = getattr(update, "__code__", None), getattr(update, "__closure__", None)
    if code is None or not closure:
        return None
    held = {name: cell.cell_contents for name, cell in zip(code.co_freevars, closure, strict=True)}
    size = held.get("step_size")
    if isinstance(size, Tensor):
        return -size.detach()
    if isinstance(size, int | float):
        return -float(size)
    inner = (held["inner"].update,) if "inner" in held else held.get("update_fns", ())
    return next((rate for link in inner if (rate := learning_rate(link)) is not None), None)


def _none(weight: Tensor) -> bool:
    return False


def _runs(task: Task, module: nn.Module | None) -> bool:
    """Whether a task's fast weights live in ``module`` itself."""
    return module is not None and task.module_names is not None and id(module) in task.module_names


def _cloned(tensors: list[Tensor | None]) -> list[Tensor | None]:
    return [tensor.detach().clone() if tensor is not None else None for tensor in tensors]


def _versions(tensors: list[Tensor | None]) -> list[int]:
    return [tensor._version if tensor is not None else -1 for tensor in tensors]


def _state(optimizer: Any) -> Iterator[object]:
    """Counts and moments of its state; a scalar parameter's moment is not a count."""
    for leaf in tree_leaves(optimizer.state_groups):
        if not isinstance(leaf, Tensor) or leaf.numel() > 1 or not leaf.is_floating_point():
            yield leaf
