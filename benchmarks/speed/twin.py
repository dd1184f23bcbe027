"""A plain PyTorch twin of some rows, for anyone who has torch and transformers: the stock Qwen2, and a small tower.

Not the reference's code; the tower restates its arithmetic (fused qkv, SDPA, exact GELU, LayerNorm) and merging is its
sort, gather and scatter. torch is no requirement of this package: it is imported only when a row is asked for.
"""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable
from typing import Any

from benchmarks.speed import models


def _torch() -> Any:
    return importlib.import_module("torch")


def _seconds(torch: Any, run: Callable[[], Any], repeats: int = 3) -> float:
    times = []
    for i in range(repeats + 1):
        began = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if i:
            times.append(time.perf_counter() - began)
    return statistics.median(times)


def _device(torch: Any) -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _peak(torch: Any) -> float | None:
    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None


def _qwen2(torch: Any, config: Any) -> Any:
    found = importlib.import_module("transformers")
    settings = found.Qwen2Config(
        vocab_size=config.vocab_size, hidden_size=config.embed_dim, intermediate_size=config.mlp_dim,
        num_hidden_layers=config.num_layers, num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads, tie_word_embeddings=config.tied, max_position_embeddings=262_144,
        rope_theta=config.rope_theta,
    )  # fmt: skip
    settings._attn_implementation = "sdpa"
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(_device(torch)):
        return found.Qwen2ForCausalLM(settings).eval().requires_grad_(False)


def prefill(*, model: str, frames: int, small: bool) -> dict[str, Any]:
    """Seconds of the stock model's forward pass with a cache, logits of the last token only."""
    torch = _torch()
    whole = models.config_of(model, small)
    llm = _qwen2(torch, whole.llm)
    length = (64 if small else frames) * whole.compressor.tokens_per_frame + models.TEXT
    x = torch.randn(1, length, whole.llm.embed_dim, device=_device(torch), dtype=torch.bfloat16)
    with torch.inference_mode():
        took = _seconds(torch, lambda: llm(inputs_embeds=x, use_cache=True, logits_to_keep=1).logits)
    return {"value": took, "peak_gib": _peak(torch), "note": f"{length:,} tokens, torch {torch.__version__}"}


def decode(*, model: str, frames: int, small: bool) -> dict[str, Any]:
    """Tokens a second of the stock model with its dynamic cache, greedy."""
    torch = _torch()
    whole = models.config_of(model, small)
    llm = _qwen2(torch, whole.llm)
    length = (16 if small else frames) * whole.compressor.tokens_per_frame + models.TEXT
    x = torch.randn(1, length, whole.llm.embed_dim, device=_device(torch), dtype=torch.bfloat16)
    count = 4 if small else 48
    with torch.inference_mode():
        out = llm(inputs_embeds=x, use_cache=True, logits_to_keep=1)
        cache, token = out.past_key_values, out.logits[:, -1:].argmax(-1)
        times = []
        for _ in range(count):
            began = time.perf_counter()
            out = llm(input_ids=token, past_key_values=cache, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
            int(token)
            times.append(time.perf_counter() - began)
    took = statistics.median(times[1:])
    return {"value": 1 / took, "peak_gib": _peak(torch), "note": f"{took * 1e3:.1f} ms a token, torch"}


def vision(*, model: str, clips: int, small: bool) -> dict[str, Any]:
    """Frames a second of a plain tower and merging over normalized pixels."""
    torch = _torch()
    config = models.config_of(model, small)
    tower, clips = config.vision, 2 if small else clips
    run = _tower(torch, tower, config.geometry().tokens_per_clip)
    px, frames = tower.image_px, tower.frames_per_clip
    pixels = torch.randn(clips * frames, 3, px, px, device=_device(torch), dtype=torch.bfloat16)
    with torch.inference_mode():
        took = _seconds(torch, lambda: run(pixels), 5)
    return {"value": clips * frames / took, "peak_gib": _peak(torch), "note": f"torch {torch.__version__}"}


def _tower(torch: Any, tower: Any, num_tokens: int) -> Callable[[Any], Any]:
    f, width, heads = torch.nn.functional, tower.embed_dim, tower.num_heads
    kind = {"device": _device(torch), "dtype": torch.bfloat16}
    new = lambda *shape: torch.randn(*shape, **kind) * 0.02
    ones, zeros = torch.ones(width, **kind), torch.zeros(width, **kind)
    embed = new(width, 3, tower.patch_px, tower.patch_px)
    blocks = [
        {"qkv": new(3 * width, width), "out": new(width, width), "up": new(tower.mlp_dim, width),
         "down": new(width, tower.mlp_dim)}
        for _ in range(tower.num_blocks)
    ]  # fmt: skip

    def run(pixels: Any) -> Any:
        x = f.conv2d(pixels, embed, stride=tower.patch_px).flatten(2).transpose(1, 2)
        x = x.reshape(-1, tower.frames_per_clip * x.shape[1], width)
        for block in blocks:
            y = f.layer_norm(x, (width,), ones, zeros)
            q, k, v = f.linear(y, block["qkv"]).reshape(*x.shape[:2], 3, heads, -1).permute(2, 0, 3, 1, 4)
            y = f.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
            x = x + f.linear(y, block["out"])
            y = f.layer_norm(x, (width,), ones, zeros)
            x = x + f.linear(f.gelu(f.linear(y, block["up"])), block["down"])
        return _merge(torch, f.layer_norm(x, (width,), ones, zeros), num_tokens, heads)

    return run


def _merge(torch: Any, x: Any, num_tokens: int, heads: int) -> Any:
    from hico_jax.models.compress.tome import merge_schedule

    sizes = torch.ones_like(x[..., :1])
    for merged in merge_schedule(x.shape[1], num_tokens):
        metric = x.reshape(*x.shape[:2], heads, -1).mean(2)
        metric = metric / metric.norm(dim=-1, keepdim=True)
        best, to = (metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)).max(-1)
        order = best.argsort(dim=-1, descending=True)[..., None]
        gone, left = order[:, :merged], order[:, merged:]
        to = to[..., None].gather(1, gone)

        def add(a: Any, gone: Any = gone, left: Any = left, to: Any = to) -> Any:
            even, odd, last = a[:, ::2], a[:, 1::2], a.shape[-1]
            moved = even.gather(1, gone.expand(-1, -1, last))
            kept = even.gather(1, left.expand(-1, -1, last))
            return torch.cat([kept, odd.scatter_reduce(1, to.expand(-1, -1, last), moved, "sum")], 1)

        x, sizes = add(x * sizes), add(sizes)
        x = x / sizes
    return x
