"""Gradient calls: ``torch.autograd.grad``, ``backward`` and ``torch.func``, under any import."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._functorch import eager_transforms
from torch.utils._pytree import tree_leaves

from divergence_probe.observe.forensics import investigator_of
from divergence_probe.observe.guard import Guard
from divergence_probe.observe.loops import Loops
from divergence_probe.observe.naming import named
from divergence_probe.observe.patching import Patches
from divergence_probe.observe.session import Session
from divergence_probe.observe.task import Task
from divergence_probe.observe.tensors import leaves


class Taken:
    """Gradients a library took inside its own step, by the identity of their tensors."""

    def __init__(self) -> None:
        self._gradients: dict[int, tuple[Tensor, Tensor | None]] = {}

    def note(self, inputs: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
        """One gradient call; of two of the same tensor the later one counts."""
        for tensor, gradient in zip(inputs, gradients, strict=False):
            self._gradients[id(tensor)] = (tensor, gradient)

    def of(self, tensor: Tensor) -> Tensor | None:
        """The gradient with respect to ``tensor``, or None."""
        entry = self._gradients.get(id(tensor))
        return entry[1] if entry is not None and entry[0] is tensor else None


class _Tap(threading.local):
    taken: Taken | None = None


_TAP = _Tap()


@contextmanager
def library_step(guard: Guard) -> Iterator[Taken]:
    """Inside a library's own step: what it calls is its own, and its gradients are handed out."""
    outer, _TAP.taken = _TAP.taken, Taken()
    try:
        with guard.gradient_call():
            yield _TAP.taken
    finally:
        _TAP.taken = outer


class _Functional(threading.local):
    """The ``torch.func`` gradient this thread is inside of.

    Attributes:
        inputs: its parameters, as the user's.
        task: the one it is expected to go on with; the step before it is still to be recorded.
    """

    def __init__(self) -> None:
        self.inputs: list[Tensor] = []
        self.task: Task | None = None


def install(patches: Patches, session: Session, loops: Loops) -> None:
    """Watch the functions every gradient goes through (``Tensor.backward`` calls one)."""
    watch = _Gradients(session, loops)
    patches.add_undo(loops.leave)
    patches.swap_code(torch.autograd.grad, watch.grad)
    patches.swap_code(torch.autograd.backward, watch.backward)
    patches.swap_code(torch.Tensor.backward, watch.leave)
    patches.set_attribute(eager_transforms, "grad_and_value_impl", watch.func)
    patches.set_attribute(eager_transforms, "_vjp_with_argnums", watch.vjp)
    patches.set_attribute(eager_transforms, "_autograd_grad", watch.inner)


class _Gradients:
    """The three handlers; each runs the user's own call exactly once, unchanged."""

    def __init__(self, session: Session, loops: Loops) -> None:
        self._session = session
        self._guard = session.guard
        self._loops = loops
        self._forensics = investigator_of(session)
        self._functional = _Functional()

    def _passes(self) -> bool:
        """Whether a call is not ours to look at: compiled, or part of an observed call."""
        guard = self._guard
        return torch.compiler.is_compiling() or not guard.watching or bool(guard.state.gradient)

    def grad(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """``torch.autograd.grad``."""

        def grad(outputs: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            if self._passes():
                return self._tapped(original, outputs, inputs, *args, **kwargs)
            work, expected = self._guard.work(), False
            with work:
                site = self._session.sites.here()
                taken = list(inputs.values()) if isinstance(inputs, dict) else inputs
                tensors = [taken] if isinstance(taken, Tensor) else list(taken)
                if not isinstance(inputs, Tensor | dict | list | tuple):
                    inputs = tensors  # an iterator can be read only once
                loss = _first_tensor(outputs)
                task = self._open(site, "grad", loss, tensors)
                expected = task is not None  # and its loss has been looked at
                watched = loss if task is None else None
                self._forensics.before(site, watched, tensors, task, self._names, ahead=expected)
            work.gradient += 1
            try:
                result = original(outputs, inputs, *args, **kwargs)
            except BaseException:
                if expected:
                    with work:
                        self._loops.settle(tensors)
                raise
            finally:
                work.gradient -= 1
            with work:
                made = list(result.values()) if isinstance(result, dict) else list(result)
                self._note(expected, site, "grad", loss, tensors, made)
                self._forensics.after(loss, tensors, made, self._names)
            return result

        return grad

    def _tapped(
        self, original: Callable[..., Any], outputs: Any, inputs: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Run a library's own call, and hand its gradients to whoever watches its step."""
        taken = _TAP.taken
        if taken is None:
            return original(outputs, inputs, *args, **kwargs)
        if not isinstance(inputs, Tensor | dict | list | tuple):
            inputs = list(inputs)  # an iterator can be read only once
        tensors = [inputs] if isinstance(inputs, Tensor) else list(inputs)
        watched = not isinstance(inputs, dict) and self._guard.watching
        if watched:
            with self._guard.work():
                site, loss = self._session.sites.here(), _first_tensor(outputs)
                self._forensics.before(site, loss, tensors, names=self._names, library=True)
        result = original(outputs, inputs, *args, **kwargs)
        if watched:
            taken.note(tensors, result)
            with self._guard.work():
                self._forensics.after(_first_tensor(outputs), tensors, result)
        return result

    def leave(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """``Tensor.backward``: the place to leave the mode stack before torch dispatches to it."""

        def backward(*args: Any, **kwargs: Any) -> Any:
            if not self._passes() and (self._guard.state.on_stack or self._forensics.watches):
                with self._guard.work():
                    self._loops.stop_following()
                    self._forensics.leave()
            return original(*args, **kwargs)

        return backward

    def backward(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """``torch.autograd.backward``."""

        def backward(tensors: Any, *args: Any, **kwargs: Any) -> Any:
            if self._passes():
                return original(tensors, *args, **kwargs)
            reached: list[Tensor] = []
            carried: list[tuple[Tensor, Tensor]] = []

            def parameters() -> Sequence[Tensor]:
                return reached or self._reached(tensors, kwargs.get("inputs"))

            with self._guard.work():
                site, loss = self._session.sites.here(), _first_tensor(tensors)
                stepped = self._loops.learned_at(site).optimizer
                if stepped is None:
                    reached = self._reached(tensors, kwargs.get("inputs"))
                    there = reached
                else:  # an optimizer takes the step: its hooks see the parameters themselves
                    there = [t for reference in stepped if (t := reference()) is not None]
                carried = [(t, t.grad.detach().clone()) for t in there if t.grad is not None]
                # the optimizer known at this line may have been the task before's, now gone
                adds = not there or any(_is_nonzero(gradient) for _, gradient in carried)
                self._open(site, "backward", loss, reached, adds)
                self._forensics.before(site, loss, parameters, names=self._names)
            with self._guard.gradient_call():
                result = original(tensors, *args, **kwargs)
            with self._guard.work():
                made = [tensor.grad for tensor in reached]
                self._note(False, site, "backward", loss, reached, made, carried)
                self._forensics.after(loss, parameters, None, self._names)
            return result

        return backward

    def _reached(self, outputs: Any, inputs: Any) -> list[Tensor]:
        """The leaves a backward accumulates into."""
        if inputs is not None:
            return [inputs] if isinstance(inputs, Tensor) else list(inputs)
        outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
        return leaves(tuple(output for output in outputs if isinstance(output, Tensor)))

    def func(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """``torch.func.grad`` and ``grad_and_value``, at any depth of transforms."""

        def grad_and_value_impl(
            func: Any, argnums: Any, has_aux: bool, args: Any, kwargs: Any
        ) -> Any:
            if self._passes():
                return original(func, argnums, has_aux, args, kwargs)
            inputs: list[Tensor] = []
            task: Task | None = None
            work, functional = self._guard.work(), self._functional
            with work:
                site = self._session.sites.here()
                inputs = _tensors([args[i] for i in _tuple(argnums)])
                if self._forensics.calm(None):
                    task = self._loops.expected(site, "func", None, inputs)
                if task is None:
                    self._loops.settle(inputs)  # its forward is still to come: nothing to split yet
            expected = task is not None
            outer = functional.inputs, functional.task
            functional.inputs, functional.task = inputs, task
            try:
                result = original(func, argnums, has_aux, args, kwargs)
            except BaseException:
                if expected:
                    with work:
                        self._loops.settle(inputs)
                raise
            finally:
                functional.inputs, functional.task = outer
            with work:
                value = result[1][0] if has_aux else result[1]
                if not expected:
                    self._open(site, "func", value, inputs)
                self._note(expected, site, "func", value, inputs, _tensors(result[0]))
            return result

        return grad_and_value_impl

    def vjp(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """``torch.func.vjp``: the gradient is taken when the returned function is called."""

        def _vjp_with_argnums(func: Any, *primals: Any, **kwargs: Any) -> Any:
            result = original(func, *primals, **kwargs)
            if self._passes():
                return result
            output, pull_back, *aux = result

            def watched(*cotangents: Any, **options: Any) -> Any:
                made = pull_back(*cotangents, **options)
                if not self._passes():
                    with self._guard.work():
                        argnums = kwargs.get("argnums")
                        taken = (
                            primals if argnums is None else [primals[i] for i in _tuple(argnums)]
                        )
                        inputs, loss = _tensors(taken), _first_tensor(output)
                        site = self._session.sites.here()
                        expected = self._open(site, "func", loss, inputs) is not None
                        self._note(expected, site, "func", loss, inputs, _tensors(made))
                return made

            return (output, watched, *aux)

        return _vjp_with_argnums

    def inner(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """The ``autograd.grad`` that functorch takes itself is not the user's."""

        def _autograd_grad(outputs: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            if self._passes():
                return original(outputs, inputs, *args, **kwargs)
            loss, tensors = _first_tensor(outputs), _tensors(inputs)
            with self._guard.work():
                site, functional = self._session.sites.here(), self._functional
                if functional.task is not None and not self._forensics.calm(loss):
                    self._loops.settle(functional.inputs)  # what the step before made is asked for
                    functional.task = None
                task = functional.task
                watched = loss if task is None else None
                self._forensics.before(
                    site, watched, tensors, task, self._names, functional.inputs,
                    ahead=task is not None,
                )  # fmt: skip
            with self._guard.gradient_call():
                result = original(outputs, inputs, *args, **kwargs)
            with self._guard.work():
                self._forensics.after(loss, tensors, _tensors(result), self._names)
            return result

        return _autograd_grad

    def _open(
        self,
        site: int,
        function: str,
        loss: Tensor | None,
        inputs: Sequence[Tensor],
        adds: bool = False,
    ) -> Task | None:
        """The task of a known loop it can only be the next step of, if there is one."""
        calm = self._forensics.calm(loss)
        task = self._loops.expected(site, function, loss, inputs) if calm else None
        if task is None:
            self._library_query(site, loss)
            self._loops.opening(function, loss, inputs, adds)
        return task

    def _note(
        self,
        expected: bool,
        site: int,
        function: str,
        loss: Tensor | None,
        inputs: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
        carried: Sequence[tuple[Tensor, Tensor]] = (),
    ) -> None:
        if len(inputs) != len(gradients):
            return
        if expected and self._loops.went_on(loss, inputs, gradients):
            return
        if expected:  # no more, since something was seen to be wrong
            self._loops.opening(function, loss, inputs)
        self._loops.gradient(site, function, loss, inputs, gradients, carried=carried)

    def _names(self, inputs: Sequence[Tensor]) -> Sequence[tuple[int, str]]:
        """Positions and names of parameters in their model."""
        inputs = self._functional.inputs or inputs
        found = [self._session.models.find(tensor) for tensor in inputs]
        if any(found) and not all(found):  # a library's state among the leaves has no name
            return [
                (f[1], f[0].layout.parameters[f[1]].name) if f is not None else (-1, "")
                for f in found
            ]
        known, positions = named(self._session.models, inputs, inputs)
        return [(position, known.layout.parameters[position].name) for position in positions]

    def _library_query(self, site: int, loss: Tensor | None) -> None:
        """A gradient outside a library's own step is taken of the query of its open task."""
        session = self._session
        for task in reversed(session.open):
            if task.module_names is not None and task.steps and task.forwards:
                scalar = loss is not None and loss.numel() == 1
                value = loss.detach() if scalar and loss is not None else None
                session.query(task, task.forwards.take(), value, site)
                return


def _first_tensor(outputs: Any) -> Tensor | None:
    if isinstance(outputs, Tensor):
        return outputs
    return next((output for output in outputs if isinstance(output, Tensor)), None)


def _tensors(tree: Any) -> list[Tensor]:
    if type(tree) is dict:  # by far the most common, and pytrees walk slowly
        if all(isinstance(leaf, Tensor) for leaf in tree.values()):
            return list(tree.values())
    elif type(tree) in (list, tuple):
        if len(tree) == 1 and type(tree[0]) is dict:
            return _tensors(tree[0])
        if all(isinstance(leaf, Tensor) for leaf in tree):
            return list(tree)
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _is_nonzero(gradient: Tensor) -> bool:
    """Whether a gradient that is there already adds anything; not asked of a device to wait for."""
    return gradient.device.type != "cpu" or gradient.is_sparse or bool(gradient.any())
