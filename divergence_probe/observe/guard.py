"""Nothing of ours may reach the user's run: a failing instrument switches the probe off."""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
import warnings
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any, Protocol

import torch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from divergence_probe.errors import DivergenceDetected
from divergence_probe.observe.tensors import is_unreal

# Bound once: they are called a dozen times in every inner step.
_clock = time.perf_counter
_DisableTorchFunction = torch._C.DisableTorchFunction
_set_grad_enabled = torch._C._set_grad_enabled
_is_grad_enabled = torch.is_grad_enabled
_functorch_active = torch._C._are_functorch_transforms_active
_backward_under_way = torch._C._current_graph_task_id

#: Whether backwards may run in threads of their own, one a device; those of the CPU never do.
BACKWARD_THREADS = bool(torch.version.cuda or torch.version.hip or torch.backends.mps.is_built())


class OnStack(Protocol):
    """Our function mode, as far as others have to do with it."""

    def pause(self) -> None:
        """Leave the stack for a while; for good where there is nothing left to see."""

    def resume(self) -> None:
        """Go back to it, unless what was being followed is over."""

    def went_by(self, arguments: Any, result: Any) -> None:
        """Take note of a call, made without it, that nothing inside of can be seen."""


class ThreadState:
    """One thread's nesting: our own work and a library's step must not be observed as the user's.

    It is also the context of :meth:`Guard.work`: one object a thread instead of one a piece of
    work, and what is entered again inside of itself has nothing left to put aside.

    Attributes:
        own: how deep inside our own work the thread is.
        inside: how deep inside calls that are observed as a whole.
        away: how deep inside either: what is called there is not the user's.
        gradient: how deep inside gradient calls, and steps of optimizers that were begun.
        step: lives as long as the step of ``torch.optim`` under way; None outside any.
        outside: how deep inside gradient calls that step was begun.
        transform: how deep inside gradients of ``torch.func``, forward and backward.
        differentiable: whether the user's code has gradients enabled, while our own work is done.
        on_stack: our function mode where it is on the thread's stack, else None.
        paused: the same while a call that is observed as a whole runs without it.
        handed: while torch hands a call to a mode, which is off the stack until it is over, what is
            to be done then: a mode of ours put on before would end up beneath it. Else None.
    """

    __slots__ = (
        "_clear", "_guard", "_started", "_torch_function", "away",
        "differentiable", "gradient", "handed", "inside", "on_stack", "outside", "own", "paused",
        "step", "transform",
    )  # fmt: skip

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self._started = 0.0
        self._torch_function = _DisableTorchFunction()
        self._clear: Any = None
        self.own = 0
        self.inside = 0
        self.away = 0
        self.gradient = 0
        self.transform = 0
        self.step: weakref.ref[object] | None = None
        self.outside = 0
        self.differentiable = True
        self.on_stack: OnStack | None = None
        self.paused: OnStack | None = None
        self.handed: list[Callable[[], None]] | None = None

    def is_in_gradient(self) -> bool:
        """Whether a gradient call or a step is under way.

        Torch does not tell of a step that an exception ended: what it was called with is gone then.
        Hooks, and what checkpointing computes again, run in the thread of a backward.
        """
        if self.gradient and self.step is not None and self.step() is None:
            self.leave_step()
        return bool(self.gradient) or (BACKWARD_THREADS and _backward_under_way() >= 0)

    def once_over(self, do: Callable[[], None]) -> None:
        """Do it once the call that torch hands to a mode is over; now, where there is none."""
        if self.handed is None:
            do()
        else:
            self.handed.append(do)

    def leave_step(self) -> None:
        """The step of ``torch.optim`` that was under way is over."""
        if self.step is not None:
            self.gradient, self.step = self.outside, None

    @property
    def transformed(self) -> bool:
        """While our own work is done: whether it was called from inside a functorch transform."""
        return self._clear is not None

    def __enter__(self) -> None:
        self.own += 1
        self.away += 1
        if self.own > 1:
            return
        self._started = _clock()
        self.differentiable = _is_grad_enabled()
        self._torch_function.__enter__()
        _set_grad_enabled(False)
        if _functorch_active():
            # Inside vmap or grad our arithmetic on plain tensors must not be transformed.
            self._clear = temporarily_clear_interpreter_stack()
            self._clear.__enter__()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        guard = self._guard
        self.own -= 1
        self.away -= 1
        if self.own == 0:
            if self._clear is not None:
                self._clear.__exit__(None, None, None)
                self._clear = None
            _set_grad_enabled(self.differentiable)
            self._torch_function.__exit__(None, None, None)
            guard.spent += _clock() - self._started
        if error is None:
            return False
        if isinstance(error, Exception) and not isinstance(error, DivergenceDetected):
            guard.fail(error)
            return True
        return False


class _Threads(threading.local):
    """Gives each thread its state; plain attributes of it are quicker than a local's own."""

    def __init__(self, guard: Guard) -> None:
        self.state = ThreadState(guard)


_GUARDS: weakref.WeakSet[Guard] = weakref.WeakSet()


def _leave_children_alone() -> None:
    """A forked child must not write into its parent's recording."""
    for guard in _GUARDS:
        guard.active = False


os.register_at_fork(after_in_child=_leave_children_alone)


class Guard:
    """Runs our bookkeeping: without gradients, without modes, timed, and never raising.

    Attributes:
        active: False once switched off, by an error of ours or at the end.
        failure: what switched it off, or None.
        spent: seconds spent in our own work so far.
        threads: has this thread's nesting as ``state``, for those who ask many times a step.
    """

    def __init__(self) -> None:
        self.active = True
        self.failure: str | None = None
        self.spent = 0.0
        self.threads = _Threads(self)
        self._inside = _Inside(self.threads)
        self._gradient_call = _GradientCall(self.threads)
        _GUARDS.add(self)

    @property
    def state(self) -> ThreadState:
        """This thread's nesting."""
        return self.threads.state

    @property
    def watching(self) -> bool:
        """Whether a call arriving now is the user's and should be looked at."""
        return self.active and not self.threads.state.away and not is_unreal()

    @property
    def differentiable(self) -> bool:
        """Whether the user's code has gradients enabled, asked from inside our own work."""
        return self.threads.state.differentiable

    def work(self) -> ThreadState:
        """Our own work inside the user's call; an error switches the probe off, once, warned."""
        return self.threads.state

    def inside(self) -> _Inside:
        """Inside a call that is already observed as a whole; what it calls is not looked at."""
        return self._inside

    def gradient_call(self) -> _GradientCall:
        """Inside a gradient call: a forward that runs here is a recomputation (checkpointing)."""
        return self._gradient_call

    def fail(self, error: Exception) -> None:
        """Switch off after ``error``, with one warning that says what to do."""
        if not self.active:
            return
        self.active = False
        frames = traceback.extract_tb(error.__traceback__)
        where = f" at {frames[-1].name}:{frames[-1].lineno}" if frames else ""
        self.failure = f"{type(error).__name__}: {error}{where}"
        advice = "" if isinstance(error, OSError) else " Please report this."
        said = (
            f"divergence_probe switched itself off: {self.failure}. Your run goes on unwatched; "
            f"the report will say incomplete.{advice}"
        )
        try:
            warnings.warn(said, RuntimeWarning, stacklevel=2)
        except RuntimeWarning:  # warnings are errors here, but ours must not end the run
            print(said, file=sys.stderr)


class _Inside:
    """One more level inside calls observed as a whole; holds no state.

    Our function mode would only see the call itself, and put frames of torch and ours between the
    user's line and it: warnings would name them.
    """

    __slots__ = ("_threads",)

    def __init__(self, threads: _Threads) -> None:
        self._threads = threads

    def __enter__(self) -> None:
        state = self._threads.state
        if state.on_stack is not None and not state.inside:
            state.paused = state.on_stack
            state.paused.pause()
        state.inside += 1
        state.away += 1

    def __exit__(self, *error: object) -> None:
        state = self._threads.state
        state.inside -= 1
        state.away -= 1
        if state.paused is not None and not state.inside:
            paused, state.paused = state.paused, None
            paused.resume()


class _GradientCall:
    """One more level inside gradient calls; holds no state."""

    __slots__ = ("_threads",)

    def __init__(self, threads: _Threads) -> None:
        self._threads = threads

    def __enter__(self) -> None:
        self._threads.state.gradient += 1

    def __exit__(self, *error: object) -> None:
        self._threads.state.gradient -= 1
