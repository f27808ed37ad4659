"""What reaches the outer step: whether the meta-gradient exists, its order, and its size."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from divergence_probe.record.schema import FLAGS, MISSING
from divergence_probe.rules.base import Frame, Rule, missing_to_nan
from divergence_probe.rules.finding import Finding, Mark, Severity
from divergence_probe.rules.quantities import whole_norm
from divergence_probe.thresholds import Thresholds


class NoMetaGradient(Rule):
    """The outer step gets no gradient: the query loss does not reach the base weights.

    ## What it does
    At each outer step, looks at the gradients of the base's parameters; where all are absent (or
    exactly zero although the queries had a gradient), says which of the known reasons it is.

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
        # since the outer step before: the largest gradient of a query, and of a task's last step
        self._query = self._support = math.nan

    def check(self, frame: Frame) -> Iterator[Finding]:
        """One finding an outer step without any gradient, after at least one task."""
        for event in frame.events("task-start"):
            self._last = event.data
        gradients = frame.block.parameters["gradient_norm"]
        previous = 0
        for row in np.flatnonzero(frame.outer):
            self._note(frame, slice(previous, int(row)))
            previous = int(row) + 1
            held = frame.block.parameters["norm_before"][row] != MISSING
            # a NaN is a gradient, if a bad one
            nothing = (gradients[row] == MISSING) | (gradients[row] == 0)
            lost = (gradients[row] == MISSING).all() or self._was_there()
            self._query = self._support = math.nan
            if not held.any() or not self._last or not nothing.all() or not lost:
                continue
            why, fix = self._reason()
            yield self.at(
                frame,
                int(row),
                f"the outer step has no gradient for any of {int(held.sum())} parameters: {why}",
                "outer step without a gradient",
                evidence={"reason": why},
                fix=fix,
            )
        self._note(frame, slice(previous, len(frame.block)))

    def _note(self, frame: Frame, rows: slice) -> None:
        """The gradients that were there to reach an outer step."""
        queries = frame.block.scalars["query_gradient"][rows]
        self._query = float(np.fmax.reduce(queries, initial=self._query))
        support, tasks = frame.support[rows], frame.task[rows]
        # (of a task that goes on in the next block, the last one here)
        last = support & np.append((tasks[1:] != tasks[:-1]) | ~support[1:], True)[: len(tasks)]
        norms = whole_norm(frame.block.parameters["gradient_norm"][rows][last])
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
    outer step before. Differentiating through an unroll multiplies one Jacobian a step; where the
    product grows, so does the meta-gradient, with inner loops that look healthy.

    ## Why it is bad
    The outer step follows chaos: its direction is noise and its size what clipping makes of it.

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

    def check(self, frame: Frame) -> Iterator[Finding]:
        """One finding an outer step whose gradient left the scale of its inner loops."""
        gradients = missing_to_nan(frame.block.parameters["gradient_norm"])
        with np.errstate(all="ignore"):
            whole = np.sqrt(np.nansum(gradients**2, axis=1))
        second = (frame.block.scalars["flags"].astype(int) & FLAGS["second_order"]) > 0
        rows = zip(*(v.tolist() for v in (frame.outer, whole, frame.step, second)), strict=True)
        for row, (outer, norm, step, differentiable) in enumerate(rows):
            if not outer:
                if math.isfinite(norm):
                    self._largest = max(self._largest, norm)
                self._steps = max(self._steps, step + 1)
                self._second_order |= differentiable
                continue
            bound = self.thresholds["meta-gradient-growth"] * self._largest
            if self._second_order and bound and math.isfinite(norm) and norm > bound:
                yield self._describe(frame, row, norm)
            self._largest, self._steps, self._second_order = 0.0, 0.0, False

    def _describe(self, frame: Frame, row: int, norm: float) -> Finding:
        rate = (norm / self._largest) ** (1 / max(self._steps, 1))
        return self.at(
            frame,
            row,
            f"the meta-gradient has norm {norm:.3g}, the largest inner gradient {self._largest:.3g}"
            f": × {rate:.2f} for each of {self._steps:.0f} unrolled steps",
            f"meta-gradient norm {norm:.3g}",
            evidence={
                "meta_gradient_norm": norm,
                "largest_inner_gradient_norm": self._largest,
                "growth_per_step": rate,
            },
            fix="Unroll fewer inner steps, or lower the inner learning rate.",
        )


class FirstOrderOnly(Rule):
    """The outer step uses first-order gradients only: FOMAML.

    ## What it does
    Notes inner steps whose gradients carry no graph while an outer step follows that does get a
    gradient.

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
        self._waiting: Finding | None = None

    def check(self, frame: Frame) -> Iterator[Finding]:
        """One finding an outer step whose tasks were all first order."""
        second = (frame.block.scalars["flags"].astype(int) & FLAGS["second_order"]) > 0
        gradients = missing_to_nan(frame.block.parameters["gradient_norm"])
        support = frame.support.tolist()
        for row in range(len(frame.block)):
            if support[row]:
                self._waiting = None
                if not second[row]:
                    self._waiting = self.at(
                        frame,
                        row,
                        "inner gradients carry no graph: the outer step does not differentiate "
                        "through the inner steps",
                        "gradient without create_graph=True",
                        fix="torch.autograd.grad(loss, fast, create_graph=True)",
                    )
            elif frame.outer[row] and self._waiting is not None:
                if (np.nan_to_num(gradients[row]) > 0).any():
                    yield self._waiting
                self._waiting = None


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
        held = np.isfinite(missing_to_nan(frame.block.parameters["norm_before"]))
        absent = held & (frame.block.parameters["gradient_norm"] == MISSING)
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
    Keeps weak references to each task's fast weights and counts those that still carry a graph
    after the outer step that should have been their last use.

    ## Why it is bad
    Memory grows with every task until the process is killed.

    ## Example
    ```python
    total += query_loss                # keeps every task's graph
    ```

    ## Use instead
    ```python
    total += query_loss.item()
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
