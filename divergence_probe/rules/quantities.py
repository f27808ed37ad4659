"""Quantities several rules compare, from the recorded columns."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from divergence_probe.record.schema import Array
from divergence_probe.rules.base import Frame, missing_to_nan
from divergence_probe.thresholds import Thresholds


def whole_norm(norms: Array) -> Array:
    """``[S]`` norm over all parameters."""
    norms = missing_to_nan(norms)
    with np.errstate(all="ignore"):
        return np.asarray(np.sqrt(np.nansum(norms**2, axis=1)))


def descent(frame: Frame) -> Array:
    """``[S]`` minus the first-order change of the loss that each row's step should make."""
    rates = frame.block.parameters["step_rate"]
    gradients = missing_to_nan(frame.block.parameters["gradient_norm"])
    with np.errstate(all="ignore"):
        return np.asarray(np.nansum(rates * gradients**2, axis=1))


def collinearity(frame: Frame) -> Array:
    """``[S]`` |cosine| between update and gradient, over all parameters."""
    gradients = missing_to_nan(frame.block.parameters["gradient_norm"])
    updates = missing_to_nan(frame.block.parameters["update_norm"])
    rates = frame.block.parameters["step_rate"]
    with np.errstate(all="ignore"):
        product = np.nansum(np.abs(rates) * gradients**2, axis=1)
        return np.asarray(product / (whole_norm(gradients) * whole_norm(updates)))


def median_rate(frame: Frame, row: int) -> float:
    """The median of a row's known step rates; nan where none is known."""
    rates = frame.block.parameters["step_rate"][row]
    rates = rates[np.isfinite(rates)]
    return float(np.median(rates)) if len(rates) else math.nan


def farness(norm: Mapping[str, Array], thresholds: Thresholds) -> Array:
    """``[S, B]`` distance of the running statistics from the batch's; above 1 is too far."""
    with np.errstate(invalid="ignore"):
        mean = norm["bn_mean_distance"] / thresholds["statistics-distance"]
        ratio = np.abs(norm["bn_log_variance_ratio"])
        return np.fmax(mean, ratio / math.log(thresholds["statistics-ratio"]))
