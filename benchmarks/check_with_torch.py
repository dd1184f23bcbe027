"""Does what we export run in PyTorch? Stock `transformers` for the language model, a restatement for the tower.

PyTorch is no requirement of this package; run this with an environment of its own that has `torch`, `transformers`
and `safetensors`, on what our own environment wrote:

    python benchmarks/check_with_torch.py write FOLDER       # with hico_jax: small models, exported, and their numbers
    TORCH_PYTHON benchmarks/check_with_torch.py check FOLDER         # with torch: the same numbers again

`tests/hico_jax/test_torch_check.py` (marked slow) does both when HICO_TORCH_PYTHON names such a Python.
"""

from __future__ import annotations

import importlib
import json
import pathlib
import sys
from typing import Any

import numpy as np


def write(folder: pathlib.Path) -> None:
    """Export small models with random weights, and record what they compute."""
    import dataclasses

    import jax
    import jax.numpy as jnp
    from flax import nnx

    from hico_jax import api, registry
    from hico_jax.convert import load
    from hico_jax.convert.export import write_released

    jax.config.update("jax_default_matmul_precision", "highest")
    folder.mkdir(parents=True, exist_ok=True)
    config = registry.model_config("tiny")
    rng = np.random.default_rng(0)
    numbers: dict[str, np.ndarray] = {}
    for name, changes in {
        "plain": {"tied": False, "norm_eps": 1e-5, "rope_theta": 1e7},
        "tied": {},
        "yarn": {"rope_kind": "yarn", "rope_factor": 4.0, "rope_original": 64, "tied": False},
    }.items():
        llm = dataclasses.replace(config.llm, max_positions=256 if name == "yarn" else 32768, **changes)
        whole = dataclasses.replace(config, llm=llm)
        graph, state = nnx.split(nnx.eval_shape(lambda whole=whole: whole.build(rngs=nnx.Rngs(0))))
        state = jax.tree.map(lambda p: jnp.asarray(rng.normal(0, 0.2, p.shape), jnp.float32), state)
        model = nnx.merge(graph, state)
        write_released(whole, load.by_path(state), folder / name, language_only=True, overwrite=True)
        ids = rng.integers(3, 64, 40)
        numbers[f"{name}.ids"], numbers[f"{name}.logits"] = ids, api.Model(model).logits(ids)
        if name == "plain":
            pixels = rng.normal(size=(2, 4, 32, 32, 3)).astype(np.float32)
            numbers["tower.pixels"], numbers["tower.out"] = pixels, np.asarray(model.vision(jnp.asarray(pixels)))
            write_released(whole, load.by_path(state), folder / "whole", overwrite=True)
    np.savez(folder / "numbers.npz", **numbers)  # type: ignore[arg-type]


def check(folder: pathlib.Path) -> None:
    """Load the exports in PyTorch and compare.

    Raises:
      SystemExit: a difference above 1e-4 of the largest value.
    """
    torch, transformers = (importlib.import_module(name) for name in ("torch", "transformers"))
    numbers, worst = np.load(folder / "numbers.npz"), {}

    def compare(name: str, got: Any, expected: np.ndarray) -> None:
        worst[name] = float(np.abs(got.detach().numpy() - expected).max() / np.abs(expected).max())

    for name in ("plain", "tied", "yarn"):
        model, info = transformers.Qwen2ForCausalLM.from_pretrained(
            folder / name, torch_dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
        wrong = {key: list(value) for key, value in info.items() if value and key != "error_msgs"}
        if wrong:
            raise SystemExit(f"{name}: {wrong}")
        ids = torch.tensor(numbers[f"{name}.ids"])[None]
        compare(name, model.eval()(ids).logits[0], numbers[f"{name}.logits"])
    compare("tower", umt(torch, folder / "whole", numbers["tower.pixels"]), numbers["tower.out"])
    print(json.dumps(worst, indent=1))
    if max(worst.values()) > 1e-4:
        raise SystemExit("differs")


def umt(torch: Any, folder: pathlib.Path, pixels: np.ndarray) -> Any:
    """The UMT tower, said again in PyTorch from the specification and the exported names alone."""
    functional = torch.nn.functional
    tensors = importlib.import_module("safetensors.torch").load_file(folder / "model.safetensors")
    root = "model.vision_tower.vision_tower.encoder."
    weights = {key.removeprefix(root): value for key, value in tensors.items() if key.startswith(root)}
    x = torch.tensor(pixels).permute(0, 4, 1, 2, 3)  # B 3 T H W
    x = functional.conv3d(x, weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"], stride=(1, 16, 16))
    x = x.flatten(2).transpose(1, 2)
    count, width, heads = x.shape[1], x.shape[2], 2
    place = np.arange(count)[:, None] / np.power(10000, 2 * (np.arange(width) // 2) / width)
    place[:, 0::2], place[:, 1::2] = np.sin(place[:, 0::2]), np.cos(place[:, 1::2])
    x = x + torch.tensor(place, dtype=torch.float32)

    def norm(x: Any, name: str, eps: float) -> Any:
        return functional.layer_norm(x, (width,), weights[f"{name}.weight"], weights[f"{name}.bias"], eps)

    def linear(x: Any, name: str) -> Any:
        return functional.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    for i in range(2):
        block = f"blocks.{i}"
        q_bias, v_bias = weights[f"{block}.attn.q_bias"], weights[f"{block}.attn.v_bias"]
        bias = torch.cat([q_bias, torch.zeros_like(q_bias), v_bias])
        qkv = functional.linear(norm(x, f"{block}.norm1", 1e-6), weights[f"{block}.attn.qkv.weight"], bias)
        q, k, v = qkv.reshape(len(x), count, 3, heads, -1).permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        x = x + linear(seen, f"{block}.attn.proj")
        x = x + linear(functional.gelu(linear(norm(x, f"{block}.norm2", 1e-6), f"{block}.mlp.fc1")), f"{block}.mlp.fc2")
    return norm(x, "vision_layernorm", 1e-12)


if __name__ == "__main__":
    {"write": write, "check": check}[sys.argv[1]](pathlib.Path(sys.argv[2]))
