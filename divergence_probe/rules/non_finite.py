"""NaN and infinity: where they are first seen."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from divergence_probe.record.schema import Array, Flags
from divergence_probe.rules.base import Frame, Rule
from divergence_probe.rules.finding import Finding, Severity


class NonFinite(Rule):
    """A loss, gradient, parameter or statistic of an inner loop is NaN or infinite.

    ## What it does
    Checks every recorded loss, gradient norm, parameter norm and BatchNorm batch statistic of a
    task, and names the first one that is not a finite number, in order of step and, within a step,
    forward order. A norm is non-finite exactly when one of its elements is, so nothing is missed.

    ## Why it is bad
    One NaN reaches every weight in the next step; predictions are then constant and the accuracy
    is chance.

    ## Example
    ```python
    loss = -(torch.softmax(logits, 1)[range(n), y].log()).mean()   # log(0) = -inf
    ```

    ## Use instead
    ```python
    loss = F.cross_entropy(logits, y)
    ```

    ## References
    pytorch/pytorch#160016 on naming the forward origin of a NaN.
    """

    code = "NF001"
    name = "non-finite-in-inner-loop"
    severity = Severity.ERROR

    def check(self, frame: Frame) -> Iterator[Finding]:
        """One finding a task, at the first row where something is not finite."""
        block = frame.block
        gradient = _bad(block.parameters["gradient_norm"])
        after = _bad(block.parameters["norm_after"])
        before = _bad(block.parameters["norm_before"])
        loss = ~np.isfinite(block.scalars["loss"]) & (block.scalars["loss_seen"] > 0)
        statistics = block.batch_norm["bn_input_finite"] == 0
        if not any(bad.any() for bad in (loss, gradient, after, before, statistics)):
            return
        hit = loss | gradient.any(1) | after.any(1) | before.any(1) | statistics.any(1)
        for row in frame.first_rows(hit & ~frame.outer):
            yield self._describe(frame, row, before, statistics, loss, gradient, after)

    def _describe(
        self,
        frame: Frame,
        row: int,
        before: Flags,
        statistics: Flags,
        loss: Flags,
        gradient: Flags,
        after: Flags,
    ) -> Finding:
        value = frame.block.scalars["loss"][row]
        layers: tuple[str, ...] = ()
        if before[row].any():
            what = "parameter"
            layers = tuple(frame.layer(int(c)) for c in np.flatnonzero(before[row]))
        elif statistics[row].any():
            what = "activation"
            layers = tuple(frame.normalization(int(c)) for c in np.flatnonzero(statistics[row]))
        elif loss[row]:
            what = "loss"
        elif gradient[row].any():
            what = "gradient"
            layers = tuple(frame.layer(int(c)) for c in np.flatnonzero(gradient[row]))
        else:
            what = "parameter"
            layers = tuple(frame.layer(int(c)) for c in np.flatnonzero(after[row]))
        layers = tuple(dict.fromkeys(layers))
        where = f" of {frame.called(layers)}" if layers else ""
        step = int(frame.step[row])
        return self.at(
            frame,
            row,
            f"the {what}{where} is not finite at step {step} (loss {value:.4g})",
            f"{what} not finite at step {step}",
            layer=layers[0] if layers else None,
            layers=layers,
            evidence={"first_bad": what, "loss": float(value)},
        )


def _bad(norms: Array) -> Flags:
    return np.asarray(~np.isfinite(norms))


class NonFiniteMetaGradient(Rule):
    """The gradient that reached the outer step is NaN or infinite.

    ## What it does
    Checks the gradient norm of every base parameter at every outer step. Where the inner loops
    before it were finite, the damage came from differentiating through the unroll.

    ## Why it is bad
    The outer step writes NaN into the base: every later task starts from it. A finite inner loop
    does not make this less of a divergence.

    ## Example
    ```python
    update = lr * m / v.sqrt()          # d sqrt(v)/dv is infinite where v is exactly 0
    ```

    ## Use instead
    ```python
    update = lr * m / (v + eps).sqrt()
    ```

    ## References
    facebookresearch/higher#125; metaopt/torchopt#26.
    """

    code = "NF002"
    name = "non-finite-meta-gradient"
    severity = Severity.ERROR

    def check(self, frame: Frame) -> Iterator[Finding]:
        """One finding for every outer step with a non-finite gradient."""
        rows = np.flatnonzero(frame.outer)
        table = _bad(frame.block.parameters["gradient_norm"][rows])
        for row, bad in zip(rows.tolist(), table, strict=True) if table.any() else ():
            if not bad.any():
                continue
            layers = tuple(dict.fromkeys(frame.layer(int(c)) for c in np.flatnonzero(bad)))
            yield self.at(
                frame,
                row,
                f"the meta-gradient of {frame.called(layers[:1])} is not finite at the outer step",
                "outer step with a non-finite gradient",
                layer=layers[0],
                layers=layers,
                evidence={"parameters": float(bad.sum())},
            )
