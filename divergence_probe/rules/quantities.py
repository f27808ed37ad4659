"""Quantities several rules compare, from the recorded columns."""

from __future__ import annotations

import math

import numpy as np

from divergence_probe.record.schema import Array
from divergence_probe.rules.base import Frame, missing_to_nan, once_a_frame
from divergence_probe.thresholds import Thresholds


def known_sum(values: Array) -> Array:
    """``[S]`` sums of what is not nan, as ``np.nansum`` without its precautions."""
    return np.asarray(np.where(np.isnan(values), 0.0, values).sum(1))


@once_a_frame
def known(frame: Frame, column: str) -> Array:
    """``[S, P]`` a column of parameters; nan where there was nothing to measure."""
    return missing_to_nan(frame.block.parameters[column])


@once_a_frame
def whole(frame: Frame, column: str) -> Array:
    """``[S]`` a column of norms, over all parameters."""
    with np.errstate(all="ignore"):
        return np.asarray(np.sqrt(known_sum(known(frame, column) ** 2)))


@once_a_frame
def descent(frame: Frame) -> Array:
    """``[S]`` minus the first-order change of the loss that each row's step should make."""
    rates = frame.block.parameters["step_rate"]
    with np.errstate(all="ignore"):
        return known_sum(rates * known(frame, "gradient_norm") ** 2)


@once_a_frame
def collinearity(frame: Frame) -> Array:
    """``[S]`` the part of an update's norm that lies along each parameter's own gradient, 0 to 1.

    (Each parameter may have a rate of its own.)
    """
    along = np.abs(frame.block.parameters["step_rate"]) * known(frame, "gradient_norm")
    with np.errstate(all="ignore"):
        return np.asarray(np.sqrt(known_sum(along**2)) / whole(frame, "update_norm"))


def median_rate(frame: Frame, row: int) -> float:
    """The median of a row's known step rates; nan where none is known."""
    rates = frame.block.parameters["step_rate"][row]
    rates = rates[np.isfinite(rates)]
    return float(np.median(rates)) if len(rates) else math.nan


@once_a_frame
def farness(frame: Frame, thresholds: Thresholds) -> Array:
    """``[S, B]`` distance of the running statistics from the batch's; above 1 is too far."""
    norm = frame.block.batch_norm
    with np.errstate(invalid="ignore"):
        mean = norm["bn_mean_distance"] / thresholds["statistics-distance"]
        ratio = np.abs(norm["bn_log_variance_ratio"])
        return np.fmax(mean, ratio / math.log(thresholds["statistics-ratio"]))
