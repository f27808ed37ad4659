"""torch.compile: compiled code runs without our function mode.

torch traces the function modes that are on the stack into what it compiles, and compiles once more
where they are others. So ours leaves while a compiled function is called: the same graphs come of
it as without us, no more and none twice. What went in and what came out is all that is seen of it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any

from divergence_probe.observe.guard import Guard, OnStack
from divergence_probe.observe.patching import FORWARDED, Patches
from divergence_probe.observe.session import Session

LIBRARY = "torch._dynamo.eval_frame"


def install(patches: Patches, session: Session) -> None:
    """Hear when a compiled function is called: torch asks for its compiler then."""
    from torch._dynamo import eval_frame

    asked = getattr(eval_frame, "_callback_from_stance", None)
    if asked is not None:  # (before 2.6 there is none: there our mode is compiled in, as it was)
        patches.swap_code(asked, lambda original: _asked(session, original))


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
        if call.get("call_succeeded", "result" in call):
            mode.went_by((call.get("args"), call.get("kwargs")), call.get("result"))
