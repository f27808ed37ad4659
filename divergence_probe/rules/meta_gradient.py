"""What reaches the outer step: whether the meta-gradient exists, its order, and its size."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from divergence_probe.record.schema import MISSING, Array
from divergence_probe.rules.base import Frame, Rule
from divergence_probe.rules.finding import Finding, Mark, Severity
from divergence_probe.rules.quantities import known, whole
from divergence_probe.thresholds import Thresholds

_TELLING = 3  # outer steps
_CLIPPED = (
    "clipping made it zero, for its norm had overflowed",
    "torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0, error_if_nonfinite=True)",
)


class _Partly:
    """Which parameters of a layout outer steps hold and have no gradient for.

    Attributes:
        adapted: ``[P]`` whether a task has moved it.
        left_out: ``[P]`` whether every outer step held it and had none for it, but for another.
        steps: outer steps that had a gradient for some.
    """

    def __init__(self, frame: Frame) -> None:
        self._names = [info.name for info in frame.block.layout.parameters]
        self.adapted = np.zeros(len(self._names), bool)
        self.left_out = np.ones(len(self._names), bool)
        self.steps = 0

    def names(self) -> list[str]:
        """Those that are both, once some outer steps have told."""
        both = np.flatnonzero(self.adapted & self.left_out)
        return [self._names[place] for place in both] if self.steps >= _TELLING else []


class NoMetaGradient(Rule):
    """The outer step gets no gradient: the query loss does not reach the base weights.

    ## What it does
    At each outer step, looks at the gradients of the base's parameters; where all are absent (or
    exactly zero although the queries had a gradient, and no backward put them there), says which of
    the known reasons it is. At the end, names other optimizers that stepped and never had a
    gradient (a warning): of the weights of samples, say. And (a remark, for they may be meant to
    begin anew) parameters that tasks adapt and outer steps hold, and never have a gradient for.

    ## Why it is bad
    Meta-training does nothing. The outer optimizer steps without a gradient, silently.

    ## Example
    ```python
    with higher.innerloop_ctx(net, opt) as (fnet, diffopt):      # copies the initial weights
        ...
        query_loss.backward()
    meta_opt.step()
    ```

    ## Use instead
    ```python
    with higher.innerloop_ctx(net, opt, copy_initial_weights=False) as (fnet, diffopt):
    ```

    ## References
    facebookresearch/higher#30, #54, #102.
    """

    code = "MG001"
    name = "no-meta-gradient"
    severity = Severity.ERROR
    cause = "no-meta-gradient"

    def __init__(self, thresholds: Thresholds) -> None:
        super().__init__(thresholds)
        self._last: dict[str, object] = {}
        self._partly: dict[tuple[int, int], _Partly] = {}  # by rank and layout
        # since the outer step before: the largest gradient of a query, and of a task's last step
        self._query = self._support = math.nan

    def check(self, frame: Frame) -> Iterator[Finding]:
        """One finding an outer step without any gradient, after at least one task."""
        starts = frame.events("task-start")
        if starts:
            self._last = starts[-1].data
        gradients = frame.block.parameters["gradient_norm"]
        steps = np.flatnonzero(frame.outer)
        # a NaN is a gradient, if a bad one; one that was not seen may have been there
        nothing = ((gradients[steps] == MISSING) | (gradients[steps] == 0)).all(1)
        nothing &= ~frame.flagged("incomplete")[steps]
        begins = [0, *(steps + 1).tolist()]
        numbers = np.flatnonzero(nothing).tolist()
        data = _data_of(frame, steps) if numbers else []
        for number in numbers:
            row = int(steps[number])
            self._note(frame, begins[number], row)
            absent = bool((gradients[row] == MISSING).all())
            # a backward's own zeros: of a hinge that every sample has passed, say
            arrived = bool(data[number].get("reached")) and not frame.flagged("clipped")[row]
            if self._last and (absent or (self._was_there() and not arrived)):
                yield from self._describe(frame, row)
        self._note(frame, begins[-1], len(frame.block))
        self._note_partly(frame, steps)
        if self._last:
            yield from self._idle(frame)

    def finish(self) -> Iterator[Finding]:
        """What tasks adapt and no outer step ever had a gradient for."""
        for (rank, _), partly in self._partly.items():
            names = partly.names()
            if names:
                yield self.finding(
                    f"{partly.steps} outer steps had no gradient for {', '.join(names[:3])}"
                    f"{' …' if len(names) > 3 else ''}, which tasks adapt, and had one for others",
                    severity=Severity.INFO,
                    rank=rank,
                    phase="outer",
                    evidence={"parameters": float(len(names))},
                    fix="fast = fast - lr * g   # no .data, no detach(), if their start is learned",
                )

    def _note_partly(self, frame: Frame, steps: npt.NDArray[np.intp]) -> None:
        """Note which parameters tasks adapt, and which of those outer steps leave out."""
        key, columns = (frame.block.rank, frame.block.layout.index), frame.block.parameters
        partly = self._partly.setdefault(key, _Partly(frame))
        partly.adapted |= (columns["update_norm"][frame.support] > 0).any(0)
        steps = steps[~frame.flagged("incomplete")[steps]]
        gradients = columns["gradient_norm"][steps]
        fed = (gradients > 0).any(1)
        partly.steps += int(fed.sum())
        left_out = (gradients[fed] == MISSING) & (columns["norm_before"][steps][fed] != MISSING)
        partly.left_out &= left_out.all(0)

    def _idle(self, frame: Frame) -> Iterator[Finding]:
        """Optimizers beside the base's: of a weighting of samples, of learned rates, say."""
        for event in frame.events("optimizer-without-gradient"):
            steps, name = int(event.data["steps"]), event.data["optimizer"]
            yield self.finding(
                f"{name} stepped {steps} times and not one of its parameters ever had a gradient: "
                "no outer loss reaches them",
                severity=Severity.WARNING,
                marks=(Mark(event.site, "step without a gradient"),) if event.site else (),
                evidence={"steps": float(steps)},
                fix="grads = torch.autograd.grad(loss, fast, create_graph=True)"
                "   # or the gradient ends at the inner step",
            )

    def _describe(self, frame: Frame, row: int) -> Iterator[Finding]:
        held = int((frame.block.parameters["norm_before"][row] != MISSING).sum())
        if held:
            zero = bool((frame.block.parameters["gradient_norm"][row] == 0).any())
            clipped = zero and bool(frame.flagged("clipped")[row])
            why, fix = _CLIPPED if clipped else self._reason()
            yield self.at(
                frame,
                row,
                f"the outer step has no gradient for any of {held} parameters: {why}",
                "outer step without a gradient",
                evidence={"reason": why},
                fix=fix,
            )

    def _note(self, frame: Frame, begin: int, end: int) -> None:
        """The gradients that were there to reach an outer step, since the one before ``begin``."""
        rows = slice(begin, end)
        if begin:
            self._query = self._support = math.nan
        queries = frame.block.scalars["query_gradient"][rows]
        self._query = float(np.fmax.reduce(queries, initial=self._query))
        support, tasks = frame.support[rows], frame.task[rows]
        # (of a task that goes on in the next block, the last one here)
        last = support & np.append((tasks[1:] != tasks[:-1]) | ~support[1:], True)[: len(tasks)]
        norms = whole(frame, "gradient_norm")[rows][last]
        self._support = float(np.fmax.reduce(norms, initial=self._support))

    def _was_there(self) -> bool:
        """Whether the queries had a gradient that did not arrive; a query's may truly be zero."""
        return self._query != 0 if not math.isnan(self._query) else self._support != 0

    def _reason(self) -> tuple[str, str]:
        data = self._last
        if data.get("adapter") == "higher":
            if data.get("copy_initial_weights"):
                return (
                    "copy_initial_weights=True cuts the fast weights from the base",
                    "higher.innerloop_ctx(net, opt, copy_initial_weights=False)",
                )
            if not data.get("track_higher_grads"):
                return (
                    "track_higher_grads=False keeps no graph through the inner loop",
                    "higher.innerloop_ctx(net, opt, copy_initial_weights=False, "
                    "track_higher_grads=True)",
                )
        if data.get("copied"):
            return (
                "the query's backward went into a copy of the model",
                "for p, q in zip(net.parameters(), learner.parameters()): p.grad = q.grad",
            )
        return (
            "the fast weights have no path to the base (leaves, .data or detach)",
            "fast = [w - lr * g for w, g in zip(fast, grads)]   # no .data, no detach()",
        )


class MetaGradientExplosion(Rule):
    """The meta-gradient is orders of magnitude larger than any gradient of the inner loops.

    ## What it does
    Compares the norm of the gradient at each outer step with the largest inner gradient since the
    outer step before, or with the one that the losses would have over the length of the weights
    (``|loss| / ||w||``: where an inner loop has converged, as one that goes on from the last
    weights, its own gradients are next to nothing; a query's loss may be of another scale).
    Differentiating through an unroll multiplies one Jacobian a step; where the product grows, so
    does the meta-gradient, with inner loops that look healthy.

    ## Why it is bad
    The outer step follows chaos: its direction is noise and its size what clipping makes of it.
    (Where it is clipped by its norm, the norm before that is what is compared.)

    ## Example
    ```python
    for _ in range(200):
        fast = [w - lr * g for ...]        # near the edge of stability
    ```

    ## Use instead
    Fewer inner steps, a smaller inner learning rate, truncated unrolls, or implicit gradients.

    ## References
    Metz et al., Gradients are not all you need, 2021; Pascanu et al., 2013.
    """

    code = "MG002"
    name = "meta-gradient-explosion"
    severity = Severity.ERROR
    cause = "meta-gradient-explosion"

    def __init__(self, thresholds: Thresholds) -> None:
        super().__init__(thresholds)
        self._largest = 0.0
        self._steps = 0.0
        self._second_order = False
        self._layout = -1
        self._used = False  # whether outer steps in a frame of their own came after these

    def check(self, frame: Frame) -> Iterator[Finding]:
        """One finding an outer step whose gradient left the scale of its inner loops."""
        norms = whole(frame, "gradient_norm")
        rows = np.flatnonzero(frame.outer)
        # of what came before each outer step of this block, and of what comes after the last
        stretch = np.cumsum(frame.outer)
        largest, steps, second = (np.zeros(len(rows) + 1) for _ in range(3))
        # outer steps of other parameters than the tasks', in a frame of their own
        alone = not frame.support.any() and frame.block.layout.index != self._layout
        self._layout = self._layout if alone else frame.block.layout.index
        if not self._used or alone:
            largest[0], steps[0], second[0] = self._largest, self._steps, self._second_order
        self._used = alone
        inner = np.where(frame.outer | ~np.isfinite(norms), 0.0, norms)
        np.maximum.at(largest, stretch, np.fmax(inner, _over_its_weights(frame)))
        np.maximum.at(steps, stretch, np.where(frame.support, frame.step + 1, 0.0))
        second[stretch[frame.flagged("second_order") & ~frame.outer]] = True
        if alone:  # the inner steps before each of them were in the frame before
            largest[:], steps[:], second[:] = largest[0], steps[0], second[0]
        bound = self.thresholds["meta-gradient-growth"] * largest[:-1]
        reached = np.fmax(norms[rows], _before_clipping(frame, rows))
        over = np.isfinite(reached) & (reached > bound) & (bound != 0)
        for number in np.flatnonzero(over & (second[:-1] > 0)).tolist():
            row, norm = int(rows[number]), float(reached[number])
            yield self._describe(frame, row, norm, float(largest[number]), float(steps[number]))
        self._largest, self._steps = float(largest[-1]), float(steps[-1])
        self._second_order = bool(second[-1])

    def _describe(
        self, frame: Frame, row: int, norm: float, largest: float, steps: float
    ) -> Finding:
        rate = (norm / largest) ** (1 / max(steps, 1))
        return self.at(
            frame,
            row,
            f"the meta-gradient has norm {norm:.3g}, the inner loops' own scale is {largest:.3g}"
            f": × {rate:.2f} for each of {steps:.0f} unrolled steps",
            f"meta-gradient norm {norm:.3g}",
            evidence={
                "meta_gradient_norm": norm,
                "largest_inner_gradient_norm": largest,
                "growth_per_step": rate,
            },
            fix="Unroll fewer inner steps, or lower the inner learning rate.",
        )


def _data_of(frame: Frame, rows: npt.NDArray[np.intp]) -> list[dict[str, Any]]:
    """What is known of outer steps beside their numbers; nothing of those by other parameters."""
    events = frame.events("outer-step")
    # An event comes right after its row; one of other parameters has its row elsewhere.
    places = np.searchsorted([e.seconds for e in events], frame.block.scalars["seconds"][rows])
    return [events[place].data if place < len(events) else {} for place in places.tolist()]


def _before_clipping(frame: Frame, rows: npt.NDArray[np.intp]) -> Array:
    """``[len(rows)]`` norms of outer gradients before they were clipped by them; nan unknown."""
    norms = [float(data.get("unclipped_norm", math.nan)) for data in _data_of(frame, rows)]
    found: Array = np.array(norms, dtype=float)
    return found


def _over_its_weights(frame: Frame) -> Array:
    """``[S]`` the gradient that each loss would have over the length of the weights it is of.

    (A query's, too: its task may have been adapted by a loss of another scale.)
    """
    loss, length = np.abs(frame.block.scalars["loss"]), whole(frame, "norm_before")
    latest = np.maximum.accumulate(np.where(length > 0, np.arange(len(length)), 0))
    length = length[latest] if len(length) else length
    with np.errstate(all="ignore"):
        scale = np.where(~frame.outer & (length > 0), loss / length, 0.0)
    return np.where(np.isfinite(scale), scale, 0.0)


class FirstOrderOnly(Rule):
    """The outer step uses first-order gradients only: FOMAML.

    ## What it does
    Notes inner steps whose gradients carry no graph, or whose updates drop it (``.data``,
    ``detach()``), while an outer step follows that does get a gradient.

    ## Why it is bad
    It may be meant (FOMAML is faster and often as good). Silently it is another algorithm.

    ## Example
    ```python
    grads = torch.autograd.grad(loss, fast)
    ```

    ## Use instead
    ```python
    grads = torch.autograd.grad(loss, fast, create_graph=True)
    ```

    ## References
    Finn et al., Model-agnostic meta-learning, 2017, section 5.2.
    """

    code = "MG003"
    name = "first-order-only"
    severity = Severity.INFO
    cause = "first-order-only"
    unit = "outer step"

    def __init__(self, thresholds: Thresholds) -> None:
        super().__init__(thresholds)
        self._last: Frame | None = None  # with inner steps
        self._used = -math.inf  # when the outer step before was taken

    def check(self, frame: Frame) -> Iterator[Finding]:
        """One finding an outer step whose tasks were all first order."""
        fed = np.asarray((frame.block.parameters["gradient_norm"] > 0).any(1))
        # (outer steps of other parameters than the tasks' come after them, in a frame of their own)
        places = [_InnerSteps(f) for f in (frame, self._last) if f is not None]
        for row in np.flatnonzero(frame.outer).tolist():
            until = float(frame.block.scalars["seconds"][row])
            found = ((place.frame, place.last_before(until)) for place in places)
            of, step = next((pair for pair in found if pair[1] >= 0), (frame, -1))
            if fed[row] and step >= 0 and of.block.scalars["seconds"][step] > self._used:
                yield from self._describe(of, step)
            self._used = until
        if frame.support.any():
            self._last = frame

    def _describe(self, frame: Frame, row: int) -> Iterator[Finding]:
        # (through a learned optimizer's own layers the outer gradient comes without a graph)
        if not frame.flagged("second_order", "transformed")[row]:
            yield self.at(
                frame,
                row,
                "the outer step does not differentiate through the inner gradients: they carry no "
                "graph, or the update drops it",
                "no create_graph=True here, or a detached gradient in the update",
                fix="grads = torch.autograd.grad(loss, fast, create_graph=True)\n"
                "fast = [w - lr * g for w, g in zip(fast, grads)]   # no .data, no detach()",
            )


class _InnerSteps:
    """The inner steps of a frame, in order of time."""

    def __init__(self, frame: Frame) -> None:
        self.frame = frame
        rows = np.flatnonzero(frame.support)
        seconds = frame.block.scalars["seconds"][rows]
        order = np.argsort(seconds, kind="stable")  # (what was held back comes late)
        self._rows, self._seconds = rows[order], seconds[order]

    def last_before(self, seconds: float) -> int:
        """The row of the last one before; -1 for none."""
        number = int(np.searchsorted(self._seconds, seconds))
        return int(self._rows[number - 1]) if number else -1


class UnusedParameters(Rule):
    """Parameters get no gradient in the inner loop.

    ## What it does
    Lists parameters of the inner loop whose gradient is absent.

    ## Why it is bad
    It may be meant (ANIL, a frozen body). Otherwise a layer is left out of the forward pass.

    ## Example
    ```python
    grads = torch.autograd.grad(loss, fast, allow_unused=True)    # hides which
    ```

    ## Use instead
    ```python
    head = [p for n, p in net.named_parameters() if n.startswith("head")]
    ```

    ## References
    Raghu et al., Rapid learning or feature reuse?, 2020 (ANIL).
    """

    code = "MG004"
    name = "unused-parameters"
    severity = Severity.INFO
    cause = "unused-parameters"

    def check(self, frame: Frame) -> Iterator[Finding]:
        """One finding a task, at its first step."""
        absent = frame.block.parameters["gradient_norm"] == MISSING
        absent &= np.isfinite(known(frame, "norm_before"))
        if not absent.any():
            return
        hit = frame.support & absent.any(1) & ~absent.all(1)
        for row in frame.first_rows(hit):
            names = tuple(frame.parameter(int(c)) for c in np.flatnonzero(absent[row]))
            layers = tuple(dict.fromkeys(frame.layer(int(c)) for c in np.flatnonzero(absent[row])))
            yield self.at(
                frame,
                row,
                f"{len(names)} parameters get no gradient in the inner loop: "
                f"{', '.join(names[:4])}{' …' if len(names) > 4 else ''}",
                "parameters without a gradient",
                layer=layers[0],
                layers=layers,
                evidence={"parameters": float(len(names))},
            )


class GraphRetained(Rule):
    """Graphs of finished tasks stay alive: memory grows from task to task.

    ## What it does
    Counts tasks whose graph is still there after the outer step that should have been its last
    use: their fast weights carry it, or a loss does after a backward that left it whole. (Any
    other backward frees nearly all of a graph's memory; a loss that is kept then is no finding.)

    ## Why it is bad
    Memory grows with every task until the process is killed.

    ## Example
    ```python
    query_loss.backward(retain_graph=True)
    history.append(query_loss)         # keeps every task's graph
    ```

    ## Use instead
    ```python
    query_loss.backward()
    history.append(query_loss.item())
    ```

    ## References
    facebookresearch/higher#6; metaopt/torchopt#218.
    """

    code = "MEM001"
    name = "graph-retained"
    severity = Severity.WARNING
    cause = "graph-retained"

    def check(self, frame: Frame) -> Iterator[Finding]:
        """One finding for every event of the retention watch."""
        for event in frame.events("graph-retained"):
            tasks = event.data.get("tasks", 0)
            yield self.finding(
                f"the graphs of {tasks} finished tasks are still alive",
                task=event.task if event.task >= 0 else None,
                marks=(Mark(event.site, "this task's graph is kept"),) if event.site else (),
                evidence={"tasks": float(tasks)},
                fix="Keep numbers, not tensors: total += loss.item(), or loss.detach().",
            )
