"""Where the exception that ended a run was raised: inside an inner loop, near one, or elsewhere.

Three kinds of evidence. The traceback's library frames: an inner step of higher or TorchOpt, a
``torch.func`` transform, a gradient taken with ``autograd.grad``. The modules in it: a forward of
fast weights is a forward of a copy. And the user's lines: inner steps were taken at lines whose
enclosing loop contains the line that raised.
"""

from __future__ import annotations

import ast
import functools
import linecache
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from divergence_probe.observe.models import unwrapped
from divergence_probe.observe.session import Session
from divergence_probe.observe.task import Task
from divergence_probe.record.schema import SUPPORT, Block

Place = Literal["inside", "near", "outside"]

#: Functions that only nested loops call: (end of the file's path, names; empty for any).
_INNER_CALLS: tuple[tuple[str, frozenset[str]], ...] = (
    ("/higher/optim.py", frozenset()),
    ("/higher/patch.py", frozenset()),
    ("/higher/__init__.py", frozenset({"innerloop_ctx"})),
    ("/torch/_functorch/eager_transforms.py", frozenset()),
    ("/torch/_functorch/vmap.py", frozenset()),
    ("/torchopt/optim/meta/base.py", frozenset({"step"})),
    ("/learn2learn/algorithms/", frozenset()),
    ("/torch/autograd/__init__.py", frozenset({"grad"})),
)
_LOOPS = (ast.For, ast.While, ast.AsyncFor)
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)


class InnerLines:
    """The user's lines at which inner steps were taken, and the task that was last."""

    def __init__(self) -> None:
        self.sites: set[str] = set()
        self.task = -1
        self.steps = 0
        self.longest = 0

    def feed(self, block: Block) -> None:
        """Take one block."""
        support = block.scalars["phase"] == SUPPORT
        for site in np.unique(block.scalars["site"][support]).astype(int):
            if 0 <= site < len(block.sites):
                self.sites.add(block.sites[site])
        for event in block.events:
            if event.kind == "task-start" and event.task > self.task:
                self.task, self.steps = event.task, 0
        rows = support & (block.scalars["task"] == self.task)
        if rows.any():
            self.steps = int(block.scalars["step"][rows].max()) + 1
        if support.any():
            self.longest = max(self.longest, int(block.scalars["step"][support].max()) + 1)


@dataclass
class Raised:
    """What is known of an exception.

    Attributes:
        place: of it, relative to inner loops; "near" is the task's own loop around one.
        site: the user's innermost line.
        own: whether the user's code raised it itself (``raise``, ``assert``).
        in_torch: whether it came out of torch or a library, not out of other code.
        layer: name of the innermost known module it was raised in, or None.
        module: that module's class, or ``""``.
        unused: parameters that ``autograd.grad`` found without a path from the loss.
        none_used: whether those are all it was asked for.
    """

    place: Place = "outside"
    site: str | None = None
    own: bool = False
    in_torch: bool = False
    layer: str | None = None
    module: str = ""
    unused: tuple[str, ...] = field(default=())
    none_used: bool = False

    def number(self, session: Session) -> int:
        """The number of its site among the run's; -1 without one."""
        table = session.sites.table
        if self.site is None:
            return -1
        if self.site not in table:
            table.append(self.site)
        return table.index(self.site)


def examine(
    error: BaseException, session: Session, lines: InnerLines, tasks: Sequence[Task]
) -> Raised:
    """Look at a traceback while its frames are alive.

    Args:
        error: what ended the run.
        session: its models and call sites.
        lines: where inner steps were taken.
        tasks: those that were open when it was raised.
    """
    raised = Raised()
    outermost: nn.Module | None = None
    begun = [task for task in tasks if task.steps and not task.provisional]
    place: Place = "outside"
    for frame, line in _frames(error):
        name = frame.f_code.co_filename
        if not session.sites.foreign(frame.f_code):
            raised.site = f"{name}:{line}"
            raised.own = linecache.getline(name, line).strip().startswith(("raise", "assert"))
            raised.in_torch = not raised.own
            place = _nearer(place, _region(name, line, lines))
            continue
        raised.in_torch = raised.in_torch or "/torch/" in name
        if _is_inner_call(frame):
            place = "inside"
            if frame.f_code.co_name == "grad":
                raised.unused, raised.layer = _unused(frame.f_locals, session)
                asked = [t for t in tree_leaves(frame.f_locals.get("inputs")) if t is not None]
                raised.none_used = 0 < len(asked) == len(raised.unused)
        elif begun and _is_backward(frame):
            place = _nearer(place, "near")  # the query's, most likely
        module = frame.f_locals.get("self")
        if not isinstance(module, nn.Module):
            continue
        outermost = outermost if outermost is not None else unwrapped(module)
        if not list(module.children()):
            raised.layer = _named(module, session, tasks, outermost) or raised.layer
            raised.module = type(module).__name__
            if _is_fast(module, session, tasks):
                place = "inside"
    raised.place = place
    return raised


def _frames(error: BaseException) -> Iterator[tuple[FrameType, int]]:
    traceback = error.__traceback__
    while traceback is not None:
        yield traceback.tb_frame, traceback.tb_lineno
        traceback = traceback.tb_next


def _is_inner_call(frame: FrameType) -> bool:
    path, function = frame.f_code.co_filename.replace("\\", "/"), frame.f_code.co_name
    return any(
        (path.endswith(end) or (end.endswith("/") and end in path))
        and (not names or function in names)
        for end, names in _INNER_CALLS
    )


def _is_backward(frame: FrameType) -> bool:
    code = frame.f_code
    path = code.co_filename.replace("\\", "/")
    return code.co_name == "backward" and path.endswith("/torch/autograd/__init__.py")


def _nearer(one: Place, other: Place) -> Place:
    order: tuple[Place, ...] = ("inside", "near", "outside")
    return min(one, other, key=order.index)


# -- the user's lines ------------------------------------------------------------------------------


def _region(filename: str, line: int, lines: InnerLines) -> Place:
    """Where a line lies relative to the loops around the lines inner steps were taken at."""
    place: Place = "outside"
    for site in lines.sites:
        path, _, number = site.rpartition(":")
        if path != filename:
            continue
        around = _enclosing(filename, int(number))
        loops = [span for span in around if span[2]]
        # The loop of the steps has something around it that repeats it, and takes several.
        if lines.longest > 1 and len(around) > 1 and loops and _within(line, loops[0]):
            return "inside"
        # A function with one loop adapts; one with more holds the whole run, its end included.
        spans = loops if len(loops) > 1 else around
        if any(_within(line, span) for span in spans):
            place = "near"
    return place


def _within(line: int, span: tuple[int, int, bool]) -> bool:
    return span[0] <= line <= span[1]


@functools.lru_cache(maxsize=256)
def _enclosing(filename: str, line: int) -> tuple[tuple[int, int, bool], ...]:
    """Loops and functions around a line, innermost first: first line, last line, is a loop."""
    try:
        tree = ast.parse("".join(linecache.getlines(filename)))
    except (SyntaxError, ValueError, RecursionError):
        return ()
    spans = [
        (node.lineno, node.end_lineno or node.lineno, isinstance(node, _LOOPS))
        for node in ast.walk(tree)
        if isinstance(node, (*_LOOPS, *_FUNCTIONS))
    ]
    around = [span for span in spans if span[0] <= line <= span[1]]
    return tuple(sorted(around, key=lambda span: span[1] - span[0]))


# -- modules and parameters ------------------------------------------------------------------------


def _named(
    module: nn.Module, session: Session, tasks: Sequence[Task], outermost: nn.Module
) -> str | None:
    """A module's name in the user's model: a task's, a known one, or the one that was called."""
    for task in reversed(tasks):
        if task.module_names is not None and id(module) in task.module_names:
            return task.module_names[id(module)]
    owner = session.models.owner(module)
    if owner is not None:
        return owner[1]
    return next((name for name, child in outermost.named_modules() if child is module), None)


def _is_fast(module: nn.Module, session: Session, tasks: Sequence[Task]) -> bool:
    """Whether a module is part of a fast model: a library's, or a deep copy of another."""
    if any(task.module_names and id(module) in task.module_names for task in tasks):
        return True
    return any(
        session.models.origin_of(parameter) is not None
        for parameter in module.parameters(recurse=False)
    )


def _parameter_name(tensor: Tensor, session: Session) -> str | None:
    models = session.models
    origin = models.origin_of(tensor)
    for one in (tensor, origin):
        if one is None:
            continue
        found = models.find(one) or models.stand_in(one)
        if found is None and models.discover([one]) is not None:
            found = models.find(one)
        if found is not None:
            return found[0].layout.parameters[found[1]].name
    return None


def _unused(variables: dict[str, Any], session: Session) -> tuple[tuple[str, ...], str | None]:
    """Names of the inputs of ``autograd.grad`` that its outputs do not depend on.

    Returns:
        The names (or the positions in the list, where tensors have none), and the first one's
        layer.
    """
    inputs = [t for t in tree_leaves(variables.get("inputs")) if isinstance(t, Tensor)]
    outputs = [t for t in tree_leaves(variables.get("outputs")) if isinstance(t, Tensor)]
    reached = _reached(outputs)
    unused = [
        (index, tensor)
        for index, tensor in enumerate(inputs)
        if tensor.requires_grad and _identity(tensor) not in reached
    ]
    names = [(_parameter_name(tensor, session), index, tensor) for index, tensor in unused]
    told = tuple(
        name or f"number {index} of {len(inputs)} {tuple(tensor.shape)}"
        for name, index, tensor in names
    )
    first = names[0][0] if names else None
    return told, first.rpartition(".")[0] or first if first is not None else None


def _identity(tensor: Tensor) -> object:
    return id(tensor) if tensor.grad_fn is None else (tensor.grad_fn, tensor.output_nr)


def _reached(outputs: list[Tensor]) -> set[object]:
    """Leaves (by id) and results of operations that ``outputs`` were computed from."""
    reached: set[object] = {_identity(output) for output in outputs}
    stack: list[Any] = [output.grad_fn for output in outputs if output.grad_fn is not None]
    seen = set(stack)
    while stack:
        node = stack.pop()
        for following, number in node.next_functions:
            if following is None:
                continue
            variable = getattr(following, "variable", None)
            reached.add(id(variable) if isinstance(variable, torch.Tensor) else (following, number))
            if following not in seen:
                seen.add(following)
                stack.append(following)
    return reached
