"""Gradient calls: ``torch.autograd.grad`` and ``backward``, under any import."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from divergence_probe.observe import mode_stack
from divergence_probe.observe.at_hand import waits_for_nothing
from divergence_probe.observe.forensics import investigator_of
from divergence_probe.observe.forensics.checking_mode import sequence_number
from divergence_probe.observe.guard import BACKWARD_THREADS, Guard, ThreadState
from divergence_probe.observe.in_turn import Point
from divergence_probe.observe.loops import Loops
from divergence_probe.observe.naming import named
from divergence_probe.observe.patching import FORWARDED, Patches
from divergence_probe.observe.session import Session
from divergence_probe.observe.tensors import in_plain_torch, is_unreal, leaves

_LISTS = (list, tuple)


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


def install(patches: Patches, session: Session, loops: Loops) -> None:
    """Watch the functions every gradient goes through (``Tensor.backward`` calls one)."""
    watch = _Autograd(session, loops)
    patches.add_undo(loops.leave)
    patches.swap_code(torch.autograd.grad, watch.grad)
    patches.swap_code(torch.autograd.backward, watch.backward)
    patches.swap_code(torch.Tensor.backward, watch.leave)


class GradientCalls:
    """What every handler of a gradient call shares; each runs the user's call once, unchanged."""

    def __init__(self, session: Session, loops: Loops) -> None:
        self._session = session
        self._guard = session.guard
        self._loops = loops
        self._forensics = investigator_of(session)

    def _passes(self) -> bool:
        """Whether a call is not ours to look at: we are off, or it is part of an observed call.

        (Whether it is being compiled is asked before: nothing of ours can be called there.)
        """
        guard = self._guard
        if not guard.active:
            return True
        state = guard.threads.state
        return bool(state.away) or state.is_in_gradient() or is_unreal()

    def _open(
        self,
        site: int,
        function: str,
        loss: Tensor | None,
        inputs: Sequence[Tensor],
        adds: bool = False,
    ) -> None:
        self._library_query(site, loss)
        self._loops.opening(site, function, loss, inputs, adds)

    def _names(self, inputs: Sequence[Tensor]) -> Sequence[tuple[int, str]]:
        """Positions and names of parameters in their model."""
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


class _Autograd(GradientCalls):
    """``torch.autograd``."""

    def grad(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """``torch.autograd.grad``."""
        guard, threads, sites = self._guard, self._guard.threads, self._session.sites
        expects, is_compiling = self._loops.known.expects, torch.compiler.is_compiling

        def grad(outputs: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            if is_compiling() or not guard.active:
                return original(outputs, inputs, *args, **kwargs)
            state = threads.state
            if state.away or ((state.gradient or BACKWARD_THREADS) and state.is_in_gradient()):
                return self._tapped(original, outputs, inputs, *args, **kwargs)
            site, known = -1, False
            if type(outputs) is Tensor and type(inputs) in _LISTS and in_plain_torch():
                site = sites.here(FORWARDED)
                if expects(site, "grad", outputs, inputs):
                    return self._next_step(state, original, outputs, inputs, *args, **kwargs)
            elif is_unreal():
                return original(outputs, inputs, *args, **kwargs)
            with guard.work():
                site = site if site >= 0 else sites.here()
                taken = list(inputs.values()) if isinstance(inputs, dict) else inputs
                tensors = [taken] if isinstance(taken, Tensor) else list(taken)
                if not isinstance(inputs, Tensor | dict | list | tuple):
                    inputs = tensors  # an iterator can be read only once
                loss, known = first_tensor(outputs), all(isinstance(t, Tensor) for t in tensors)
                if known:  # (torch also takes edges of a graph, which are no parameters)
                    self._open(site, "grad", loss, tensors)
                    self._forensics.before(site, loss, tensors, names=self._names)
            with guard.gradient_call():
                result = original(outputs, inputs, *args, **kwargs)
            if not known:
                return result
            with guard.work():
                made = list(result.values()) if isinstance(result, dict) else list(result)
                self._loops.gradient(site, "grad", loss, tensors, made)
                if _retains(*args, **kwargs):
                    self._loops.retained(loss)
                self._forensics.after(loss, tensors, made, self._names)
            return result

        return grad

    def _next_step(
        self,
        state: ThreadState,
        original: Callable[..., Any],
        outputs: Tensor,
        inputs: Sequence[Tensor],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Take the gradient that was expected next."""
        before = sequence_number()
        state.gradient += 1
        try:
            result = original(outputs, inputs, *args, **kwargs)
        except BaseException:
            with state:
                self._loops.settle(inputs)
            raise
        finally:
            state.gradient -= 1
        with state:
            self._loops.known.went_on(outputs, inputs, result, before, sequence_number())
        return result

    def _tapped(
        self, original: Callable[..., Any], outputs: Any, inputs: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Run a call inside an observed one; a library's step is handed its gradients."""
        taken = _TAP.taken
        if taken is None:
            return original(outputs, inputs, *args, **kwargs)
        if not isinstance(inputs, Tensor | dict | list | tuple):
            inputs = list(inputs)  # an iterator can be read only once
        tensors = [inputs] if isinstance(inputs, Tensor) else list(inputs)
        watched = not isinstance(inputs, dict) and self._guard.watching
        if watched:
            with self._guard.work():
                site, loss = self._session.sites.here(), first_tensor(outputs)
                self._forensics.before(site, loss, tensors, names=self._names, library=True)
        result = original(outputs, inputs, *args, **kwargs)
        if watched:
            taken.note(tensors, result)
            with self._guard.work():
                self._forensics.after(first_tensor(outputs), tensors, result)
        return result

    def leave(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """``Tensor.backward``: the place to leave the mode stack before torch dispatches to it."""

        def backward(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling() or self._passes():
                return original(*args, **kwargs)
            state = self._guard.state
            if state.on_stack or self._forensics.watches:
                with self._guard.work():
                    self._loops.stop_following()
                    self._forensics.leave()
            if not mode_stack.height() or state.handed is not None:
                return original(*args, **kwargs)
            state.handed = []
            try:
                return original(*args, **kwargs)
            finally:
                handed, state.handed = state.handed, None
                with self._guard.work():
                    for do in handed:
                        do()

        return backward

    def backward(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """``torch.autograd.backward``."""

        def backward(tensors: Any, *args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling() or self._passes():
                return original(tensors, *args, **kwargs)
            reached: list[Tensor] = []
            there: list[Tensor] = []
            carried: list[tuple[Tensor, Tensor]] = []

            def parameters() -> Sequence[Tensor]:
                return reached or self._reached(tensors, kwargs.get("inputs"))

            with self._guard.work():
                site, loss = self._session.sites.here(), first_tensor(tensors)
                if kwargs.get("inputs") is None:
                    reached = there = self._loops.keeping_gradients(loss)
                stepped = self._loops.learned_at(site).optimizer if not reached else None
                if stepped is not None:  # an optimizer's hooks see the parameters themselves
                    there = [t for reference in stepped if (t := reference()) is not None]
                if not there and (stepped is None or self._loops.is_open):
                    # (That optimizer is gone; the next one may learn from what tasks came to.)
                    there = reached = self._reached(tensors, kwargs.get("inputs"))
                carried = [(t, t.grad.detach().clone()) for t in there if t.grad is not None]
                # the optimizer known at this line may have been the task before's, now gone
                adds = not there or any(_is_nonzero(gradient) for _, gradient in carried)
                self._open(site, "backward", loss, reached, adds)
                self._forensics.before(site, loss, parameters, names=self._names)
            with self._guard.gradient_call():
                result = original(tensors, *args, **kwargs)
            with self._guard.work():
                made = [tensor.grad for tensor in reached]
                point = Point.of(there) if self._loops.tasks.in_turn.adapted else None
                self._loops.gradient(
                    site, "backward", loss, reached, made, carried=carried, point=point
                )
                if _retains(*args, **kwargs):
                    self._loops.retained(loss)
                self._forensics.after(loss, parameters, None, self._names)
            return result

        return backward

    def _reached(self, outputs: Any, inputs: Any) -> list[Tensor]:
        """The leaves a backward accumulates into."""
        if inputs is not None:
            return [inputs] if isinstance(inputs, Tensor) else list(inputs)
        outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
        return leaves(tuple(output for output in outputs if isinstance(output, Tensor)))


def first_tensor(outputs: Any) -> Tensor | None:
    """The first tensor among what a gradient is taken of."""
    if isinstance(outputs, Tensor):
        return outputs
    return next((output for output in outputs if isinstance(output, Tensor)), None)


def _retains(
    weights: Any = None, retain_graph: Any = None, create_graph: Any = False, *_: Any, **__: Any
) -> bool:
    """Whether a gradient call leaves its graph whole, by what else it is called with."""
    return bool(create_graph if retain_graph is None else retain_graph)


def _is_nonzero(gradient: Tensor) -> bool:
    """Whether a gradient that is there already adds anything; not asked of a device to wait for."""
    return not waits_for_nothing(gradient) or gradient.is_sparse or bool(gradient.any())
