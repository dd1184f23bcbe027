"""Does what we export run in PyTorch? Stock `transformers` for the language models, restatements for the towers.

PyTorch is no requirement of this package; run this with an environment of its own that has `torch`, `transformers`
and `safetensors`, on what our own environment wrote:

    python benchmarks/check_with_torch.py write FOLDER       # with hico_jax: small models, exported, and their numbers
    TORCH_PYTHON benchmarks/check_with_torch.py check FOLDER         # with torch: the same numbers again

Where `peft` is there too, the adapters of a fine-tuning run are put on the stock model, beside and merged.

`tests/hico_jax/test_torch_check.py` (marked slow) does both when HICO_TORCH_PYTHON names such a Python.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import pathlib
import sys
from typing import Any

import numpy as np

# tower -> its key in our registry, and the clips it is shown: clips, frames, height, width
TOWERS: dict[str, tuple[str, dict[str, tuple[int, ...]]]] = {
    "umt": ("umt", {"clips": (2, 4, 32, 32), "image": (1, 1, 32, 32)}),
    "internvideo2": ("internvideo2", {"clips": (2, 4, 28, 28), "image": (1, 1, 28, 28)}),
    "internvit": ("internvit", {"clips": (1, 4, 56, 56), "larger": (1, 2, 84, 112)}),
}


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
    config, rng = registry.model_config("tiny"), np.random.default_rng(0)
    numbers: dict[str, np.ndarray] = {}

    def filled(config: Any, name: str, *, language_only: bool) -> Any:
        """The model with random weights, exported."""
        graph, state = nnx.split(nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0))))
        state = jax.tree.map(lambda p: jnp.asarray(rng.normal(0, 0.2, p.shape), jnp.float32), state)
        write_released(config, load.by_path(state), folder / name, language_only=language_only, overwrite=True)
        return nnx.merge(graph, state)

    internlm2 = registry.LLM["internlm2"].VARIANTS["tiny"]
    for name, llm in {
        "plain": dataclasses.replace(config.llm, tied=False, norm_eps=1e-5, rope_theta=1e7),
        "tied": config.llm,
        "yarn": dataclasses.replace(
            config.llm, rope_kind="yarn", rope_factor=4.0, rope_original=64, tied=False, max_positions=256
        ),
        "internlm2": internlm2,
    }.items():
        whole = dataclasses.replace(config, llm=llm)
        if llm is internlm2:
            whole = dataclasses.replace(
                whole, vision=registry.VISION["internvit"].VARIANTS["tiny"], projector="norm_mlp"
            )
        ids = rng.integers(3, 64, 40)
        model = filled(whole, name, language_only=True)
        numbers[f"{name}.ids"], numbers[f"{name}.logits"] = ids, api.Model(model).logits(ids)
        if name == "plain":
            model = adapt(model, whole, rng, folder / "adapter")
            numbers["adapter.ids"], numbers["adapter.logits"] = ids, api.Model(model).logits(ids)
    for name, (tower, cases) in TOWERS.items():
        whole = dataclasses.replace(config, vision=registry.VISION[tower].VARIANTS["tiny"])
        if tower == "internvit":
            whole = dataclasses.replace(whole, llm=internlm2, projector="norm_mlp")
        model = filled(whole, name, language_only=False)
        for case, shape in cases.items():
            pixels = rng.normal(size=(*shape, 3)).astype(np.float32)
            numbers[f"{name}.{case}.pixels"] = pixels
            numbers[f"{name}.{case}.out"] = np.asarray(model.vision(jnp.asarray(pixels)))
    np.savez(folder / "numbers.npz", **numbers)  # type: ignore[arg-type]


def adapt(model: Any, config: Any, rng: np.random.Generator, folder: pathlib.Path) -> Any:
    """The model with random adapters on every matrix of its language model, which are exported for PEFT."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from hico_jax import checkpoint, lora, optim
    from hico_jax.convert import load

    settings = optim.LoraConfig(rank=4, alpha=10.0)
    graph, _ = nnx.split(model)
    frozen = optim.split(model, ((r".*", None),))[2]
    adapters = jax.tree.map(
        lambda a: jnp.asarray(rng.normal(0, 0.1, a.shape), a.dtype), lora.begin(frozen, settings, 0)
    )  # fmt: skip
    arrays = checkpoint.flatten(frozen) | checkpoint.flatten(adapters)
    lora.save_peft(arrays, settings, {rule.path: rule for rule in load.rules(config)}, folder)
    return nnx.merge(graph, *lora.join(adapters, frozen, settings))


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
    if importlib.util.find_spec("peft"):
        model = transformers.Qwen2ForCausalLM.from_pretrained(
            folder / "plain", torch_dtype=torch.float32, attn_implementation="eager"
        )  # fmt: skip
        model = importlib.import_module("peft").PeftModel.from_pretrained(model, folder / "adapter").eval()
        ids, expected = torch.tensor(numbers["adapter.ids"])[None], numbers["adapter.logits"]
        compare("adapter, PEFT", model(ids).logits[0], expected)
        compare("adapter, merged by PEFT", model.merge_and_unload()(ids).logits[0], expected)
        apart = np.abs(expected - numbers["plain.logits"]).max() / np.abs(expected).max()
        if apart < 0.01:
            raise SystemExit("the adapter changes nothing, so it shows nothing")
    model = as_llama(torch, transformers, folder / "internlm2")
    compare("internlm2", model(torch.tensor(numbers["internlm2.ids"])[None]).logits[0], numbers["internlm2.logits"])
    restated = {"umt": umt, "internvideo2": internvideo2, "internvit": internvit}
    for name, (_, cases) in TOWERS.items():
        for case in cases:
            made = restated[name](torch, folder / name, numbers[f"{name}.{case}.pixels"])
            compare(f"{name} {case}", made, numbers[f"{name}.{case}.out"])
    print(json.dumps(worst, indent=1))
    if max(worst.values()) > 1e-4:
        raise SystemExit("differs")


def tensors_of(folder: pathlib.Path, root: str = "") -> dict[str, Any]:
    """The exported tensors whose names begin with `root`, without it."""
    found = importlib.import_module("safetensors.torch").load_file(folder / "model.safetensors")
    return {key.removeprefix(root): value for key, value in found.items() if key.startswith(root)}


def as_llama(torch: Any, transformers: Any, folder: pathlib.Path) -> Any:
    """InternLM2, which `transformers` does not have, as the Llama that it is once its fused matrix is taken apart."""
    told, weights = json.loads((folder / "config.json").read_text()), tensors_of(folder)
    config = transformers.LlamaConfig(
        attention_bias=False, mlp_bias=False, attn_implementation="eager",
        **{key: told[key] for key in (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "rms_norm_eps", "rope_theta", "max_position_embeddings", "tie_word_embeddings",
        )},
    )  # fmt: skip
    group = told["num_attention_heads"] // told["num_key_value_heads"]
    width = told["hidden_size"] // told["num_attention_heads"]
    state = {
        "model.embed_tokens.weight": weights["model.tok_embeddings.weight"],
        "model.norm.weight": weights["model.norm.weight"],
        "lm_head.weight": weights.get("output.weight", weights["model.tok_embeddings.weight"]),
    }
    for i in range(told["num_hidden_layers"]):
        theirs, llama = f"model.layers.{i}", f"model.layers.{i}.self_attn"
        fused = weights[f"{theirs}.attention.wqkv.weight"].reshape(-1, group + 2, width, told["hidden_size"])
        for name, rows in (("q", fused[:, :group]), ("k", fused[:, group]), ("v", fused[:, group + 1])):
            state[f"{llama}.{name}_proj.weight"] = rows.reshape(-1, told["hidden_size"])
        state[f"{llama}.o_proj.weight"] = weights[f"{theirs}.attention.wo.weight"]
        for name, other in (
            ("mlp.gate_proj", "feed_forward.w1"), ("mlp.up_proj", "feed_forward.w3"),
            ("mlp.down_proj", "feed_forward.w2"),
            ("input_layernorm", "attention_norm"), ("post_attention_layernorm", "ffn_norm"),
        ):  # fmt: skip
            state[f"{theirs}.{name}.weight"] = weights[f"{theirs}.{other}.weight"]
    model = transformers.LlamaForCausalLM(config).to(torch.float32).eval()
    model.load_state_dict(state)
    return model


def rms(torch: Any, x: Any, weight: Any) -> Any:
    """x over the root of its mean square, times a weight."""
    return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weight


def heads_of(x: Any, count: int) -> Any:
    """[B N C] as [B heads N C/heads]."""
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def internvideo2(torch: Any, folder: pathlib.Path, pixels: np.ndarray) -> Any:
    """The InternVideo2 tower from the specification and the exported names alone."""
    functional, weights = torch.nn.functional, tensors_of(folder, "model.vision_tower.vision_tower.")
    x = torch.tensor(pixels).permute(0, 4, 1, 2, 3)
    x = functional.conv3d(x, weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"], stride=(1, 14, 14))
    x = torch.cat([weights["cls_token"].expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], 1)
    x = x + weights["img_pos_embed" if pixels.shape[1] == 1 else "pos_embed"]
    for i in range(2):
        w = {key.removeprefix(f"blocks.{i}."): v for key, v in weights.items() if key.startswith(f"blocks.{i}.")}
        q, k, v = (rms(torch, x, w["norm1.weight"]) @ w["attn.qkv.weight"].T).chunk(3, -1)
        q, k = rms(torch, q, w["attn.q_norm.weight"]), rms(torch, k, w["attn.k_norm.weight"])
        scores = heads_of(q, 2) @ heads_of(k, 2).transpose(-1, -2) / (q.shape[-1] / 2) ** 0.5
        seen = (scores.softmax(-1) @ heads_of(v, 2)).transpose(1, 2).flatten(2)
        x = x + functional.linear(seen, w["attn.proj.weight"], w["attn.proj.bias"]) * w["ls1.weight"]
        up = functional.linear(rms(torch, x, w["norm2.weight"]), w["mlp.fc1.weight"], w["mlp.fc1.bias"])
        x = x + functional.linear(functional.gelu(up), w["mlp.fc2.weight"], w["mlp.fc2.bias"]) * w["ls2.weight"]
    return x[:, 1:]


def internvit(torch: Any, folder: pathlib.Path, pixels: np.ndarray) -> Any:
    """InternViT and its pixel shuffle, from the specification and the exported names alone."""
    functional, weights = torch.nn.functional, tensors_of(folder, "vision_model.")
    x = torch.tensor(pixels).flatten(0, 1).permute(0, 3, 1, 2)
    patch = "embeddings.patch_embedding"
    x = functional.conv2d(x, weights[f"{patch}.weight"], weights[f"{patch}.bias"], stride=14)
    table, size = weights["embeddings.position_embedding"], x.shape[2:]
    side = round((table.shape[1] - 1) ** 0.5)
    places = table[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    places = functional.interpolate(places, size=size, mode="bicubic", align_corners=False)
    x = (x + places).flatten(2).transpose(1, 2)
    cls = weights["embeddings.class_embedding"] + table[:, :1]
    x = torch.cat([cls.expand(len(x), -1, -1), x], 1)
    for i in range(2):
        root = f"encoder.layers.{i}."
        w = {key.removeprefix(root): v for key, v in weights.items() if key.startswith(root)}
        normed = functional.layer_norm(x, x.shape[-1:], w["norm1.weight"], w["norm1.bias"], 1e-6)
        qkv = functional.linear(normed, w["attn.qkv.weight"], w["attn.qkv.bias"])
        q, k, v = (heads_of(part, 2) for part in qkv.chunk(3, -1))
        seen = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + w["ls1"] * functional.linear(seen, w["attn.proj.weight"], w["attn.proj.bias"])
        normed = functional.layer_norm(x, x.shape[-1:], w["norm2.weight"], w["norm2.bias"], 1e-6)
        up = functional.gelu(functional.linear(normed, w["mlp.fc1.weight"], w["mlp.fc1.bias"]))
        x = x + w["ls2"] * functional.linear(up, w["mlp.fc2.weight"], w["mlp.fc2.bias"])
    x = x[:, 1:].unflatten(1, size)
    squares = [x[:, down::2, across::2] for down in (0, 1) for across in (0, 1)]
    return torch.cat(squares, -1).reshape(len(pixels), -1, 4 * x.shape[-1])


def umt(torch: Any, folder: pathlib.Path, pixels: np.ndarray) -> Any:
    """The UMT tower, said again in PyTorch from the specification and the exported names alone."""
    functional, weights = torch.nn.functional, tensors_of(folder, "model.vision_tower.vision_tower.encoder.")
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
