"""Put instruments into torch and into libraries, and take every one of them out again."""

from __future__ import annotations

import threading
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

#: Where handlers seem to be written. ``warnings`` counts no frame of a file with "importlib" and
#: "_bootstrap" in its name, so that a warning of a watched function (``stacklevel=2``) names the
#: line that called it, and is filtered by that line's module, as without us.
PASSED_OVER = "<divergence_probe, passed over by warnings like importlib._bootstrap>"

#: How many frames a handler is away from the line that called the function it stands for.
FORWARDED = 3

# A function keeps its closure, so what stands in for its code must have the same free variables.
_FORWARDING = """
def enclosing({free}):
    def {name}(*args, **kwargs):
        return {handler}(*args, **kwargs)
        {free}
    return {name}
"""


@dataclass(frozen=True, slots=True)
class _Patch:
    """One patch, and the way back from it.

    Attributes:
        present: what is there now in the place that was patched.
        put: what this patch put there.
        was: what it found there.
        restore: puts ``was`` back.
        pass_on: makes what it put there do no more than call ``was``.
    """

    present: Callable[[], object]
    put: object
    was: object
    restore: Callable[[], None]
    pass_on: Callable[[], None] = lambda: None


#: Patches that are no longer wanted, and lie below one of another probe, by what they put.
_left: dict[int, _Patch] = {}
_lock = threading.RLock()


def _take_out(patch: _Patch) -> None:
    """Take a patch out, and those below it that were only waiting for that.

    Where another probe has patched over it (they need not end in the order in which they began),
    it stays where it is and does nothing, until that one goes. What others than we have put there
    is left alone.
    """
    with _lock:
        if patch.present() is not patch.put:
            patch.pass_on()
            _left[id(patch.put)] = patch
            return
        below: _Patch | None = patch
        while below is not None:
            below.restore()
            below = _left.pop(id(below.was), None)


class Patches:
    """What is patched at the moment; :meth:`undo` restores it in reverse order."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []
        #: Our codes that run where a function is called whose code was swapped.
        self.codes: dict[Callable[..., Any], list[types.CodeType]] = {}

    def swap_code(
        self, function: Any, make: Callable[[Callable[..., Any]], Callable[..., Any]]
    ) -> None:
        """Make ``function`` call a handler, whatever name the user imported it under.

        The function object stays the same, so ``from torch.autograd import grad`` is covered as
        well as ``torch.autograd.grad``, and so are tables that torch keeps of its own functions
        (``torch.compile`` does, of all it knows how to trace, from its first use on). Its signature
        and documentation stay readable.

        Args:
            function: a plain Python function.
            make: takes a callable that runs the original code, returns the handler.
        """
        saved = (function.__code__, function.__defaults__, function.__kwdefaults__)
        original = types.FunctionType(
            saved[0], function.__globals__, function.__name__, saved[1], function.__closure__
        )
        original.__kwdefaults__ = saved[2]
        original.__module__ = function.__module__
        original.__annotations__ = function.__annotations__
        handler_name = f"_divergence_probe_{function.__name__}_{id(self)}"
        namespace: dict[str, Any] = {}
        free = ", ".join(saved[0].co_freevars)
        source = _FORWARDING.format(name=function.__name__, handler=handler_name, free=free)
        exec(compile(source, PASSED_OVER, "exec"), namespace)  # noqa: S102 - our own template
        handler_globals = function.__globals__
        handler = handler_globals[handler_name] = _passed_over(make(original))
        had_wrapped = "__wrapped__" in function.__dict__
        function.__defaults__ = function.__kwdefaults__ = None
        function.__code__ = namespace["enclosing"](*saved[0].co_freevars).__code__
        if not had_wrapped:
            function.__wrapped__ = original
        self.codes[function] = [function.__code__, handler.__code__]

        def restore() -> None:
            function.__code__, function.__defaults__, function.__kwdefaults__ = saved
            if not had_wrapped:
                function.__dict__.pop("__wrapped__", None)
            handler_globals.pop(handler_name, None)

        def pass_on() -> None:
            handler_globals[handler_name] = original

        patch = _Patch(lambda: function.__code__, function.__code__, saved[0], restore, pass_on)
        self._undo.append(lambda: self._forget(function, patch))

    def _forget(self, function: Any, patch: _Patch) -> None:
        self.codes.pop(function, None)
        _take_out(patch)

    def set_attribute(
        self, owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]
    ) -> None:
        """Replace ``owner.name`` by ``make(original)``, restoring inheritance when undone."""
        own = name in vars(owner)
        original = vars(owner)[name] if own else getattr(owner, name)
        replacement = _passed_over(make(original))
        setattr(owner, name, replacement)

        def restore() -> None:
            if own:
                setattr(owner, name, original)
            else:
                delattr(owner, name)

        patch = _Patch(lambda: vars(owner).get(name), replacement, original, restore)
        self._undo.append(lambda: _take_out(patch))

    def add_attribute(self, owner: Any, name: str, value: Any) -> None:
        """Give ``owner`` an attribute that it does not have, nor inherits."""
        if hasattr(owner, name):
            return
        value = _passed_over(value)
        setattr(owner, name, value)

        def undo() -> None:
            if vars(owner).get(name) is value:
                delattr(owner, name)

        self._undo.append(undo)

    def add_undo(self, undo: Callable[[], None]) -> None:
        """Register any other way back, such as a hook handle's ``remove``."""
        self._undo.append(undo)

    def undo(self) -> None:
        """Restore everything, the latest first."""
        while self._undo:
            self._undo.pop()()


def _passed_over(handler: Callable[..., Any]) -> Callable[..., Any]:
    """Make a handler's frame one that warnings do not count."""
    if isinstance(handler, types.FunctionType):
        handler.__code__ = handler.__code__.replace(co_filename=PASSED_OVER)
    return handler
