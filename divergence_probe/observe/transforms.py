"""Gradient calls of ``torch.func``: ``grad``, ``grad_and_value`` and ``vjp``, under any import."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch import eager_transforms

from divergence_probe.observe.forensics.checking_mode import sequence_number
from divergence_probe.observe.gradients import GradientCalls, first_tensor
from divergence_probe.observe.loops import Loops
from divergence_probe.observe.patching import FORWARDED, Patches
from divergence_probe.observe.session import Session
from divergence_probe.observe.tensors import are_transforms_active, plain, tensors_in


def install(patches: Patches, session: Session, loops: Loops) -> None:
    """Watch what every ``torch.func`` gradient goes through."""
    watch = _Transforms(session, loops)
    patches.swap_code(eager_transforms.grad_and_value_impl, watch.func)
    patches.swap_code(eager_transforms._vjp_with_argnums, watch.vjp)
    patches.swap_code(eager_transforms._autograd_grad, watch.inner)


is_compiling = torch.compiler.is_compiling  # (compiled in, a handler may call nothing of ours)
# How many frames a handler's helper is away from whoever called the handler.
_BEHIND_HANDLER = FORWARDED + 1


class _Inside(threading.local):
    """The ``torch.func`` gradient this thread is inside of.

    Attributes:
        site: number of the user's line.
        inputs: its parameters, as the user's.
        expected: whether it is the next step of a known loop, and nothing is wrong so far.
        before: the next autograd node's number when its backward began.
        after: the same when it ended.
    """

    def __init__(self) -> None:
        self.site = -1
        self.inputs: list[Tensor] = []
        self.expected = False
        self.before = self.after = 0


class _Transforms(GradientCalls):
    """``torch.func``, at any depth of transforms."""

    def __init__(self, session: Session, loops: Loops) -> None:
        super().__init__(session, loops)
        self._inside = _Inside()

    def func(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """``torch.func.grad`` and ``grad_and_value``."""

        def grad_and_value_impl(
            func: Any, argnums: Any, has_aux: bool, args: Any, kwargs: Any
        ) -> Any:
            if is_compiling() or self._passes():
                return original(func, argnums, has_aux, args, kwargs)
            work, inside = self._guard.work(), self._inside
            site, inputs, expected = self._begin(argnums, args)
            if not expected:
                with work:
                    self._loops.settle(inputs)  # its forward is still to come: nothing to split yet
            outer = inside.site, inside.inputs, inside.expected
            inside.site, inside.inputs, inside.expected = site, inputs, expected
            work.transform += 1
            try:
                result = original(func, argnums, has_aux, args, kwargs)
                expected = inside.expected
            except BaseException:
                if inside.expected:
                    with work:
                        self._loops.settle(inputs)
                raise
            finally:
                work.transform -= 1
                inside.site, inside.inputs, inside.expected = outer
            with work:
                value, made = result[1][0] if has_aux else result[1], tensors_in(result[0])
                if not expected or not self._loops.known.went_on(
                    value, inputs, made, inside.before, inside.after
                ):
                    self._open(site, "func", value, inputs)
                    self._loops.gradient(site, "func", value, inputs, made)
            return result

        return grad_and_value_impl

    def _begin(self, argnums: Any, args: Any) -> tuple[int, list[Tensor], bool]:
        """The line of a gradient, what it is taken of, and whether that was expected next."""
        try:
            site = self._session.sites.here(_BEHIND_HANDLER)
            inputs = tensors_in([args[i] for i in _tuple(argnums)])
        except Exception as error:
            self._guard.fail(error)
            return -1, [], False
        plain_torch = not are_transforms_active()
        return (
            site,
            inputs,
            plain_torch and self._loops.known.expects(site, "func", None, inputs),
        )

    def vjp(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """``torch.func.vjp``: the gradient is taken when the returned function is called."""

        def _vjp_with_argnums(func: Any, *primals: Any, **kwargs: Any) -> Any:
            result = original(func, *primals, **kwargs)
            if is_compiling() or self._passes():
                return result
            output, pull_back, *aux = result

            def watched(*cotangents: Any, **options: Any) -> Any:
                made = pull_back(*cotangents, **options)
                if not (is_compiling() or self._passes()):
                    with self._guard.work():
                        argnums = kwargs.get("argnums")
                        taken = (
                            primals if argnums is None else [primals[i] for i in _tuple(argnums)]
                        )
                        inputs, loss = tensors_in(taken), first_tensor(output)
                        site = self._session.sites.here()
                        self._open(site, "func", loss, inputs)
                        self._loops.gradient(site, "func", loss, inputs, tensors_in(made))
                return made

            return (output, watched, *aux)

        return _vjp_with_argnums

    def inner(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """The ``autograd.grad`` that functorch takes itself is not the user's."""

        def _autograd_grad(outputs: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            if is_compiling() or self._passes():
                return original(outputs, inputs, *args, **kwargs)
            guard, inside = self._guard, self._inside
            loss = first_tensor(outputs)
            if (
                inside.expected
                and loss is not None
                and self._forensics.calm(inside.site, plain(loss))
            ):
                inside.before = sequence_number()
                with guard.gradient_call():
                    result = original(outputs, inputs, *args, **kwargs)
                inside.after = sequence_number()
                return result
            tensors = tensors_in(inputs)
            with guard.work():
                if inside.expected:
                    self._loops.settle(inside.inputs)  # what the step before made is asked for
                    inside.expected = False
                site = self._session.sites.here()
                self._forensics.before(
                    site, loss, tensors, names=self._names, sources=inside.inputs
                )
            with guard.gradient_call():
                result = original(outputs, inputs, *args, **kwargs)
            with guard.work():
                self._forensics.after(loss, tensors, tensors_in(result), self._names)
            return result

        return _autograd_grad

    def _names(self, inputs: Sequence[Tensor]) -> Sequence[tuple[int, str]]:
        return super()._names(self._inside.inputs or inputs)


def _tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)
