from __future__ import annotations

import numpy as np
import pytest

from hico_jax.convert.rules import Rule, match

TABLE = [
    (Rule("a.weight", "a", "O I -> I O"), (6, 5), (5, 6)),
    (Rule("a.weight", "a", "(H d) D -> D H d"), (6, 5), (5, 2, 3)),
    (Rule("a.weight", "a", "(3 H d) E -> E 3 H d"), (18, 5), (5, 3, 2, 3)),
    (Rule("a.weight", "a", "E c 1 y x -> y x (1 c) E"), (4, 3, 1, 2, 2), (2, 2, 3, 4)),
    (Rule("a.bias", "b"), (7,), (7,)),
]


@pytest.mark.parametrize(("rule", "torch", "ours"), TABLE)
def test_both_ways(rule, torch, ours):
    assert rule.torch_shape(ours) == torch
    tensor = np.arange(np.prod(torch)).reshape(torch)
    array = rule.to_ours(tensor, rule.sizes(ours))
    assert array.shape == ours
    np.testing.assert_array_equal(rule.to_torch(array), tensor)


def test_heads_are_the_slow_part_of_a_row():
    rule = Rule("q.weight", "wq", "(H d) D -> D H d")
    tensor = np.arange(12).reshape(6, 2)
    array = rule.to_ours(tensor, {"H": 2, "d": 3})
    assert array[1, 1, 0] == tensor[3, 1]


def test_names_and_layers():
    rule = Rule("model.layers.{i}.w", "blocks/w")
    assert rule.names(2) == ["model.layers.0.w", "model.layers.1.w"]
    assert Rule("model.w", "w").names(2) == ["model.w"]
    found = match(["model.layers.11.w", "model.layers.11.w2", "model.layersx.1.w", "other"], [rule])
    assert found == {"model.layers.11.w": (rule, 11)}


def test_mistakes_name_the_tensor():
    rule = Rule("q.weight", "wq", "(H d) D -> D H d")
    with pytest.raises(ValueError, match=r"q\.weight has shape \(7, 5\)"):
        rule.to_ours(np.zeros((7, 5)), {"H": 2})
    with pytest.raises(ValueError, match="expects 2 axes"):
        rule.to_ours(np.zeros(7), {"H": 2})
    with pytest.raises(ValueError, match="not all given"):
        rule.to_ours(np.zeros((6, 5)))
