"""Every number a rule compares with: its unit, its default, and where it comes from."""

from __future__ import annotations

import contextlib
import difflib
import math
import numbers
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from divergence_probe.errors import UsageError


@dataclass(frozen=True)
class Threshold:
    """One number a rule compares with.

    Attributes:
        name: as given to ``--threshold NAME=VALUE``.
        default: its value unless overridden.
        unit: of the value.
        source: why this value: a mechanism, a paper, a thread or a measurement.
    """

    name: str
    default: float
    unit: str
    source: str


CATALOGUE: tuple[Threshold, ...] = (
    Threshold(
        "norm-growth",
        10.0,
        "ratio of a parameter's norm after a task's step to before the task",
        "Inner loops move a trained weight by under a percent (9.5937 to 9.5940 in the reference "
        "log); a decade within one task is another regime. Counts only where the loss is not "
        "falling: scale-invariant weights before BatchNorm may grow freely (arXiv:1706.05350).",
    ),
    Threshold(
        "norm-growth-any-loss",
        1000.0,
        "ratio, as norm-growth, whatever the loss does",
        "Three decades in one task leave no precision for further updates: float32 resolves "
        "1.2e-7 of the weight.",
    ),
    Threshold(
        "small-parameter",
        0.03,
        "fraction of the whole model's norm below which a parameter counts as this fraction",
        "Zero-initialised heads and biases have no scale of their own; their relative growth at "
        "the first step is infinite.",
    ),
    Threshold(
        "loss-growth",
        100.0,
        "ratio of a support loss to the task's first support loss",
        "Gradient descent below 2/curvature never raises the loss on a quadratic (Nesterov 2018, "
        "section 1.2.3); noise between minibatches stays well below two decades.",
    ),
    Threshold(
        "instability",
        2.0,
        "step size x curvature along the step, dimensionless",
        "The stability limit of gradient descent on a quadratic (Nesterov 2018, section 1.2.3).",
    ),
    Threshold(
        "ineffective-update",
        2e-5,
        "largest update of any layer in a step, as a fraction of its norm",
        "A hundred steps of it move a layer by 0.2 %; smdebug flags below 1e-8 a step for training "
        "that has a million steps, an inner loop has ten.",
    ),
    Threshold(
        "effective-gradient",
        0.05,
        "sum of |gradient| |weight| over layers as a fraction of the loss",
        "What changing the weights by 100 % could change of the loss, to first order; a converged "
        "support loss has none left.",
    ),
    Threshold(
        "meta-gradient-growth",
        1e3,
        "norm of the meta-gradient over the scale of its inner loops: the largest inner gradient, "
        "or loss over norm of the weights",
        "The unroll's Jacobians multiply: contracting inner loops give a factor below the number "
        "of steps.",
    ),
    Threshold(
        "clipped-share",
        0.95,
        "fraction of the steps at which clipping was active",
        "Clipping that is always active sets the step length itself (facebookresearch/higher#18).",
    ),
    Threshold(
        "statistics-distance",
        1.0,
        "RMS over channels of |running - batch mean| in batch standard deviations",
        "Few-shot batches of the training distribution measured 0.1 to 0.5; untrained statistics "
        "of real nets measured 1 to 20.",
    ),
    Threshold(
        "statistics-ratio",
        4.0,
        "running / batch variance or its inverse, geometric mean over channels",
        "A batch variance from 8 values lies within a factor 4 of the true one with probability "
        "above 99 % (chi-square, 7 degrees of freedom).",
    ),
    Threshold(
        "values-per-channel",
        8.0,
        "values a channel is normalised over in train mode",
        "The standard error of the batch mean is 1/sqrt(n) batch deviations: over a third below 8.",
    ),
    Threshold(
        "rank-difference",
        1e-5,
        "difference of a base weight's norm on two ranks, as a fraction of it",
        "Data parallel keeps weights bit-identical; the float32 norm of equal weights, summed in "
        "another order, differs by some 1e-7. A hundred roundings are allowed for.",
    ),
)

_BY_NAME = {threshold.name: threshold for threshold in CATALOGUE}


class Thresholds:
    """The numbers in force: the defaults with the user's overrides.

    Args:
        overrides: name to value, a finite number from 0 on.

    Raises:
        UsageError: for a name that is not in the catalogue, and for a value that is no such number.
    """

    def __init__(self, overrides: Mapping[str, float] | None = None) -> None:
        given = {} if overrides is None else overrides
        if not isinstance(given, Mapping):
            raise UsageError(
                f"Thresholds are {given!r}; write names and numbers, as {{'norm-growth': 5.0}}."
            )
        self._values = {t.name: t.default for t in CATALOGUE}
        self._values |= {_known(name): _number(name, value) for name, value in given.items()}

    def __getitem__(self, name: str) -> float:
        return self._values[name]


def _known(name: str) -> str:
    if name in _BY_NAME:
        return name
    close = difflib.get_close_matches(str(name), _BY_NAME, n=1)
    hint = f" Did you mean {close[0]}?" if close else ""
    raise UsageError(
        f"There is no threshold named {name!r}.{hint} Thresholds: {', '.join(sorted(_BY_NAME))}."
    )


def _number(name: str, value: object) -> float:
    number = math.nan
    if not isinstance(value, bool) and isinstance(value, numbers.Real):
        with contextlib.suppress(OverflowError):
            number = float(value)
    # All are ratios, fractions and counts; nothing is above nan or infinity: a rule that compared
    # with them would be silenced unseen.
    if not 0 <= number < math.inf:
        raise UsageError(
            f"Threshold {name} is {value!r}; write a finite number from 0 on. What silences a rule "
            "is ignore."
        )
    return number


def parse_overrides(texts: Iterable[str]) -> dict[str, float]:
    """``["norm-growth=5"]`` to ``{"norm-growth": 5.0}``.

    Raises:
        UsageError: where a text is not ``NAME=VALUE`` with a number that will do.
    """
    overrides = {}
    for text in texts:
        name, separator, value = text.partition("=")
        try:
            overrides[name.strip()] = float(value)
        except ValueError:
            separator = ""
        if not separator:
            raise UsageError(f"--threshold {text!r}: expected NAME=VALUE with a number as VALUE.")
    Thresholds(overrides)
    return overrides
