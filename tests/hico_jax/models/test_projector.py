from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hico_jax.models import layers, projector
from hico_jax.models.compress.tome import ToMeConfig
from tests import golden_rows


class Sizes(NamedTuple):
    """What builds a projector."""

    inward: int
    outward: int

    def build(self, *, rngs):
        return projector.Projector(*self, rngs=rngs)


def filled(tensors):
    sizes = Sizes(*tensors["mlp.0.weight"].shape[::-1])
    return golden_rows.filled(
        sizes, projector.TORCH_NAMES, tensors, ours="projector", theirs="model.mm_projector.", layers=1
    )


project = jax.jit(lambda module, x: module(x))


def test_recorded_reference(golden):
    """Merging and projection on recorded outputs of UMT and InternVideo2 towers."""
    for name in golden.names("D_projector"):
        case = golden.case("D_projector", name)
        config, tensors = case["config"], golden.tensors(case["file"])
        patches = golden.tensors(config["input"]["file"])[config["input"]["tensor"]]
        patches = patches.reshape(config["input"]["reshape_to"])
        if config["forward_kwargs"]["compress"]:
            frames = config["forward_kwargs"]["local_num_frames"]
            patches = patches.reshape(-1, frames * patches.shape[1], patches.shape[2])
        compressor = ToMeConfig().build(num_heads=config["heads"])
        module = filled(golden.tensors(config["weights_file"]))
        merged = jax.jit(lambda x, c=compressor: c(x, 64))(patches)
        # Values are O(1) and the reference's own float32 is 1.2e-6 from its float64. Reached: 1.5e-6.
        np.testing.assert_allclose(merged, tensors["merged"], atol=5e-6, err_msg=name)
        np.testing.assert_allclose(project(module, merged), tensors["out"], atol=1e-5, err_msg=name)


def test_by_hand():
    module = projector.Projector(1, 1, rngs=nnx.Rngs(0))
    first, second = module.first, module.second
    for parameter, value in ((first.w, 2.0), (first.b, -1.0), (second.w, 3.0), (second.b, 1.0)):
        parameter.set_value(jnp.full(parameter.get_value().shape, value))
    x = jnp.asarray([[[1.0]], [[0.0]]])  # gelu(1) = 0.841345, gelu(-1) = -0.158655: the exact form
    np.testing.assert_allclose(module(x).ravel(), [1 + 3 * 0.8413447, 1 - 3 * 0.1586553], rtol=1e-6)
    assert module(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_published_sizes():
    for vision_dim, embed_dim, count in ((1024, 3584, 16_522_240), (1024, 1536, 3_935_232), (1408, 3584, 17_898_496)):
        module = nnx.eval_shape(lambda v=vision_dim, d=embed_dim: projector.Projector(v, d, rngs=nnx.Rngs(0)))
        assert layers.num_params(module) == count
