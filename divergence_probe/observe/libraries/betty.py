"""betty: the steps of a lower problem between two steps of the upper one are a task.

A problem with parents is an inner one: each of its optimizer steps is an inner step, in place, on
its own module. One with children is an outer one; what its loss runs through the children's modules
is their query. A problem in the middle is both.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from divergence_probe.observe.capture import Forwards
from divergence_probe.observe.gradients import Taken, library_step
from divergence_probe.observe.models import KnownModel, fast_module_names
from divergence_probe.observe.optimizer_facts import learning_rate_of
from divergence_probe.observe.patching import Patches
from divergence_probe.observe.session import Session
from divergence_probe.observe.snapshot import kept_as_stepped
from divergence_probe.observe.task import Task
from divergence_probe.record.schema import FLAGS

LIBRARY = "betty.problems"


def install(patches: Patches, session: Session) -> None:
    """Watch the steps of problems, and the gradients inside them."""
    from betty.problems import Problem

    watch = _Problems(session)
    patches.set_attribute(Problem, "one_step_descent", watch.one_step_descent)
    patches.set_attribute(Problem, "backward", watch.backward)
    patches.set_attribute(Problem, "step_after_roll_back", watch.step_after_roll_back)


@dataclass
class _Descent:
    """One ``one_step_descent`` in progress.

    Attributes:
        before: the parameters before it, in the problem's own order.
        rest: ended with the step: from the gradient on, everything is the step's own.
        gradients: what the optimizer is given, once it was taken.
        loss: whose gradient was taken.
    """

    before: list[Tensor]
    rest: ExitStack
    gradients: list[Tensor | None] = field(default_factory=list)
    loss: Tensor | None = None
    second_order: bool = False


class _Problems:
    """What is known of problems; weak, so that nothing of the user's is kept alive."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.tasks: weakref.WeakKeyDictionary[Any, Task] = weakref.WeakKeyDictionary()
        self.known: weakref.WeakKeyDictionary[Any, KnownModel] = weakref.WeakKeyDictionary()
        self.under_way: weakref.WeakKeyDictionary[Any, _Descent] = weakref.WeakKeyDictionary()
        # What ran for gradients that were only accumulated so far, and their losses.
        self.accumulated: weakref.WeakKeyDictionary[Any, Forwards] = weakref.WeakKeyDictionary()
        self.losses: weakref.WeakKeyDictionary[Any, Tensor] = weakref.WeakKeyDictionary()

    def one_step_descent(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """One step of a problem: forward, gradient, update."""

        def one_step_descent(self_: Any, *args: Any, **kwargs: Any) -> Any:
            guard = self.session.guard
            nested = bool(self_._parents or self_._children)
            if not guard.watching or not nested or self_ in self.under_way:
                return original(self_, *args, **kwargs)
            with ExitStack() as rest:
                with guard.work():
                    if self_._parents:
                        self._task(self_)
                    before = [kept_as_stepped(tensor) for tensor in self_.trainable_parameters()]
                    self.under_way[self_] = _Descent(before, rest)
                try:
                    result = original(self_, *args, **kwargs)
                finally:
                    descent = self.under_way.pop(self_, None)
                if descent is not None:
                    with guard.work():
                        self._finish(self_, descent)
            return result

        return one_step_descent

    def _model(self, problem: Any) -> KnownModel:
        known = self.known.get(problem)
        if known is None:
            known = self.known[problem] = self.session.models.register(problem.module)
        return known

    def _task(self, problem: Any) -> Task:
        """The task a lower problem is in; a new one after each step of the upper."""
        task = self.tasks.get(problem)
        if task is not None and not task.ended:
            return task
        module: nn.Module = problem.module
        task = self.session.start_task(
            self._model(problem),
            "betty",
            self.session.sites.here(),
            optimizer=_optimizer(problem),
            problem=problem.name,
            in_place=True,
            unroll_steps=int(problem._unroll_steps),
            roll_back=bool(problem._roll_back),
            first_order=bool(problem._first_order),
            base_training=bool(module.training),
        )
        functional = getattr(problem, "fmodule", None)  # an iterative problem's stateless copy
        running = getattr(functional, "stateless_model", None) or module
        task.module_names = fast_module_names(running)
        task.in_place = True
        self.tasks[problem] = task
        return task

    def backward(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """The gradient of a step, and of an upper problem the lower ones' queries.

        The best-response Jacobian runs the lower problem's loss again, with its weights perturbed:
        that is part of the outer gradient, no step or forward of the lower problem's own.
        """

        def backward(self_: Any, loss: Tensor, params: Any, *args: Any, **kwargs: Any) -> Any:
            guard = self.session.guard
            descent = self.under_way.get(self_)
            if descent is None:
                return original(self_, loss, params, *args, **kwargs)
            with guard.work():
                for child in self_._children:
                    self._query(child, loss)
            taken = descent.rest.enter_context(library_step(guard))
            with ExitStack() as jacobian:
                if self_._paths:
                    jacobian.enter_context(guard.inside())
                result = original(self_, loss, params, *args, **kwargs)
            with guard.work():
                descent.loss = loss.detach() * self_.gas  # it was divided by that
                descent.gradients = [_gradient(tensor, taken) for tensor in params]
                descent.second_order = any(
                    g is not None and g.requires_grad
                    for t in params
                    if (g := taken.of(t)) is not None
                )
            return result

        return backward

    def _query(self, child: Any, loss: Tensor) -> None:
        """What the upper problem's loss ran through a lower one's module."""
        task = self.tasks.get(child)
        if task is not None and not task.ended and task.steps:
            forwards = task.forwards.take()
            self.session.query(task, forwards, loss.detach(), self.session.sites.here())
        for grandchild in child._children:
            self._query(grandchild, loss)

    def _finish(self, problem: Any, descent: _Descent) -> None:
        """Record the step once its optimizer has moved the parameters."""
        session = self.session
        task = self.tasks.get(problem) if problem._parents else None
        if task is not None:
            forwards = self.accumulated.setdefault(problem, Forwards())
            forwards.extend(task.forwards.take())
        if problem._count % problem.gas:
            self._accumulate(problem, descent)
            return
        known = self._model(problem)
        after = [kept_as_stepped(tensor) for tensor in problem.trainable_parameters()]
        if not len(descent.before) == len(after) == len(known.layout.parameters):
            session.unseen(
                f"betty's problem {problem.name} trains other than its module's parameters."
            )
            return
        gradients = descent.gradients or [None] * len(after)
        groups = getattr(problem.optimizer, "param_groups", ())
        site, rate = session.sites.here(), learning_rate_of(groups)
        for child in problem._children:
            self._end(child)
        if task is None:
            session.outer_step(
                known, descent.before, after, gradients,
                learning_rate=rate, site=site, optimizer=_optimizer(problem),
            )  # fmt: skip
            return
        session.step(
            task,
            descent.before,
            after,
            gradients,
            loss=self._loss(problem, descent),
            learning_rate=rate,
            site=site,
            forwards=self.accumulated.pop(problem),
            flags=_flags(problem, descent),
        )
        task.fast = [weakref.ref(tensor) for tensor in problem.trainable_parameters()]

    def _accumulate(self, problem: Any, descent: _Descent) -> None:
        if descent.loss is not None:
            earlier = self.losses.get(problem)
            self.losses[problem] = descent.loss if earlier is None else earlier + descent.loss

    def _loss(self, problem: Any, descent: _Descent) -> Tensor | None:
        """The step's loss; the mean of those whose gradients were accumulated."""
        earlier = self.losses.pop(problem, None)
        if earlier is None or descent.loss is None:
            return descent.loss
        mean: Tensor = (earlier + descent.loss) / problem.gas
        return mean

    def _end(self, problem: Any) -> None:
        task = self.tasks.get(problem)
        if task is not None:
            self.session.finish_task(task)
        for child in problem._children:
            self._end(child)

    def step_after_roll_back(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """A step taken again from where the unrolling began is a task by itself."""

        def step_after_roll_back(self_: Any, *args: Any, **kwargs: Any) -> Any:
            result = original(self_, *args, **kwargs)
            if self.session.guard.watching and self_._roll_back:
                with self.session.guard.work():
                    self._end(self_)
            return result

        return step_after_roll_back


def _gradient(tensor: Tensor, taken: Taken) -> Tensor | None:
    """What the optimizer is given: ``.grad``, where looking at it is no warning."""
    gradient: Tensor | None = tensor.grad if tensor.is_leaf else taken.of(tensor)
    return gradient.detach().clone() if gradient is not None else None


def _flags(problem: Any, descent: _Descent) -> int:
    flags = FLAGS["second_order"] if descent.second_order else 0
    flags |= FLAGS["clipped"] if problem.gradient_clipping > 0 else 0
    return flags | (FLAGS["accumulated"] if problem.gas > 1 else 0)


def _optimizer(problem: Any) -> str:
    return type(problem.optimizer).__name__ if problem.optimizer is not None else ""
