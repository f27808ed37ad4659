"""Gradients that are exactly zero: an example of a rule, for divergence_probe/rules/."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from divergence_probe.rules.base import Frame, Rule
from divergence_probe.rules.finding import Finding, Severity


class DeadGradient(Rule):
    """A layer's gradient was exactly zero in an inner step.

    ## What it does
    Reports layers whose gradient has norm 0 after a task's first step. The first step is left out:
    behind a zero-initialised head every gradient is zero there, by design.

    ## Why it is bad
    The layer is not adapted at all, although the optimizer was given it.

    ## Example
    ```python
    hidden = torch.relu(self.first(x) - 1e6)     # never active: no gradient reaches self.first
    ```

    ## Use instead
    ```python
    hidden = torch.nn.functional.leaky_relu(self.first(x))
    ```

    ## References
    Lu et al., Dying ReLU and initialization, arXiv:1903.06733.
    """

    code = "EXAMPLE001"
    name = "dead-gradient"
    severity = Severity.WARNING

    def check(self, frame: Frame) -> Iterator[Finding]:
        """One finding a task, at its first such step."""
        dead = frame.block.parameters["gradient_norm"] == 0  # [S, P]
        dead &= (frame.support & (frame.step > 0))[:, None]
        for row in frame.first_rows(dead.any(1)):
            columns = np.flatnonzero(dead[row])
            layers = tuple(dict.fromkeys(frame.layer(int(column)) for column in columns))
            yield self.at(
                frame,
                row,
                f"{layers[0]} got a gradient of exactly zero",
                f"no gradient reaches {', '.join(layers)}",
                layer=layers[0],
                layers=layers,
                evidence={"parameters": float(len(columns))},
                fix="look for what cuts the gradient off between this layer and the loss",
            )
