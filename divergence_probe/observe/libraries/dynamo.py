"""torch.compile: compiled code runs without our function mode.

torch traces the function modes that are on the stack into what it compiles, and compiles once more
where they are others. So ours leaves while a compiled function is called: the same graphs come of
it as without us, no more and none twice. What went in and what came out is all that is seen of it.

Nor is our own code compiled. Handlers in place of torch's functions return at once where they are
compiled in; what torch would have to call, an optimizer's hooks, runs as it is, between two graphs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch

import divergence_probe
from divergence_probe.observe.guard import Guard, OnStack
from divergence_probe.observe.patching import FORWARDED, Patches
from divergence_probe.observe.session import Session

LIBRARY = "torch._dynamo.eval_frame"


@cache
def _own_files() -> frozenset[str]:
    package = Path(divergence_probe.__file__).parent
    return frozenset(path.as_posix() for path in package.rglob("*.py"))


def install(patches: Patches, session: Session) -> None:
    """Hear when a compiled function is called (torch asks for its compiler then); skip our code."""
    from torch._dynamo import eval_frame, trace_rules

    files = getattr(trace_rules, "FORCE_SKIP_FILES", None)
    if isinstance(files, set):
        ours = _own_files() - files
        files.update(ours)
        patches.add_undo(lambda: files.difference_update(ours))
    skip_code = getattr(eval_frame, "skip_code", None)
    if skip_code is not None:
        _skip_backwards(patches, skip_code)
    asked = getattr(eval_frame, "_callback_from_stance", None)
    if asked is not None:  # (before 2.6 there is none: there our mode is compiled in, as it was)
        patches.swap_code(asked, lambda original: _asked(session, original))


def _skip_backwards(patches: Patches, skip_code: Callable[[CodeType], None]) -> None:
    """Have handlers of backwards called as they are.

    A backward in a compiled function comes between two graphs, where torch would compile every
    frame by itself that is not its own.
    """
    for function in (torch.autograd.grad, torch.autograd.backward, torch.Tensor.backward):
        for code in patches.codes.get(function, ()):
            skip_code(code)


def _asked(session: Session, original: Callable[[Any], Any]) -> Callable[[Any], Any]:
    guard = session.guard
    threads = guard.threads

    def _callback_from_stance(callback: Any) -> Any:
        result = original(callback)
        mode = threads.state.on_stack
        if mode is not None and result is not None and guard.active:
            with guard.work():
                mode.pause()
                frame = sys._getframe(FORWARDED - 1)
                cleanups = frame.f_locals.get("cleanups")
                if isinstance(cleanups, list):  # what torch does when the call is over
                    cleanups.append(partial(_over, guard, mode, [frame]))
        return result

    return _callback_from_stance


def _over(guard: Guard, mode: OnStack, frames: list[FrameType]) -> None:
    """A compiled function, called in a frame, has come to an end."""
    with guard.work():
        mode.resume()
        call = frames.pop().f_locals  # (kept in there, the frame would keep itself and its graph)
        if call.get("call_succeeded", True):  # (before 2.13 neither that nor the result is there)
            mode.went_by((call.get("args"), call.get("kwargs")), call.get("result"))
