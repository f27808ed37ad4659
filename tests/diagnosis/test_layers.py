"""Layers are counted once, under however many names they were met."""

from __future__ import annotations

import numpy as np

from divergence_probe.diagnosis.layers import WatchedLayers
from divergence_probe.record.schema import MISSING, Layout, ParameterInfo
from tests.rules.blocks import inner, make

SHAPES = ((6, 3), (6,), (2, 6), (2,))
NAMED = ("body.0.weight", "body.0.bias", "head.weight", "head.bias")


def count(*layouts: tuple[str, tuple[str, ...], tuple[tuple[int, ...], ...], str]) -> int:
    watched = WatchedLayers()
    for number, (model, names, shapes, kind) in enumerate(layouts):
        block = make(inner(), parameters=names)
        infos = tuple(
            ParameterInfo(name, shape, "float32", "cpu", kind)
            for name, shape in zip(names, shapes, strict=True)
        )
        block.layout = Layout(number, model, infos)
        watched.feed(block)
    return watched.count()


def nameless(shapes: tuple[tuple[int, ...], ...]) -> tuple[str, ...]:
    return tuple(f"param[{i}] {'x'.join(map(str, s))}" for i, s in enumerate(shapes))


def test_a_model_met_again_without_names_or_as_a_part() -> None:
    whole = ("Net", NAMED, SHAPES, "Linear")
    assert count(whole) == 2
    assert count(whole, whole) == 2
    assert count(whole, ("", nameless(SHAPES), SHAPES, "")) == 2
    assert count(("", nameless(SHAPES[2:]), SHAPES[2:], ""), whole) == 2
    assert count(("Sequential", ("0.weight", "0.bias"), SHAPES[:2], "Linear"), whole) == 2


def test_models_that_are_not_one_another() -> None:
    whole = ("Net", NAMED, SHAPES, "Linear")
    other = ((9, 3), (9,))
    assert count(whole, ("", nameless(other), other, "")) == 3
    critic = ("Critic", ("body.0.weight", "body.0.bias", "value.weight"), (*SHAPES[:2], (1, 6)), "")
    assert count(whole, critic) == 3


def test_weights_in_a_list_are_layers_with_their_biases() -> None:
    assert count(("", nameless(SHAPES), SHAPES, "")) == 2
    norm = ((6, 3), (6,), (6,), (6,), (2, 6), (2,))
    names = tuple(f"vars.{i}" for i in range(6))
    assert count(("Learner", names, norm, "ParameterList")) == 3


def test_what_was_never_measured_was_not_watched() -> None:
    watched = WatchedLayers()
    block = make(inner(), parameters=("body.0.weight", "head.weight"))
    block.parameters["norm_before"] = np.asarray([[MISSING, 1.0]])
    watched.feed(block)
    assert watched.count() == 1
