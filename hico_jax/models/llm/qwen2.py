"""Qwen2 and Qwen2.5: configuration, sizes, module and torch names.

In: a `Stream` of embeddings. Out: the stream after all layers and the last norm (hidden states, not logits).
Next: hico_jax/models/llm/decoder.py
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx

from hico_jax.batch import DropPlan, DropSchedule
from hico_jax.convert.rules import Rule
from hico_jax.kernels.decode import contract, contract_all, gated
from hico_jax.kernels.packed import Packed
from hico_jax.models import attention, layers
from hico_jax.models.llm import cache as kv_cache
from hico_jax.models.llm import decoder, lanes, reuse
from hico_jax.models.llm.decoder import Place, Stream
from hico_jax.parallel.sharding import lookup, shard
from hico_jax.shapes import Array, Bool, Float, Int

NO_DROP = DropSchedule()


@dataclasses.dataclass(frozen=True)
class Qwen2Config:
    """Sizes of one Qwen2. The released checkpoints differ in theta and eps: read them from `config.json`."""

    arch: ClassVar[str] = "qwen2"
    vocab_size: int  # rows of the embedding, a few more than the tokenizer knows
    embed_dim: int
    mlp_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 1e6
    norm_eps: float = 1e-6
    tied: bool = False  # the unembedding is the embedding transposed
    max_positions: int = 32768  # positions seen in training; longer rows run, at the user's risk
    rope_kind: str = "default"  # or "yarn", "dynamic": how positions beyond `rope_original` are reached
    rope_factor: float = 1.0
    rope_original: int = 32768  # positions before the scaling; unused by "default"
    init_std: float = 0.02  # of random matrices; a small model learns sooner from about 1 / sqrt(embed_dim)
    remat: bool = False  # recompute each layer in the backward pass instead of keeping its activations
    remat_keeps: str = "attention"  # what a layer keeps all the same, beside its input: one of decoder.KEEPS

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads is {self.num_heads} and num_kv_heads {self.num_kv_heads}; the first must be a multiple of "
                "the second"
            )
        if self.rope_kind not in layers.ROPE_KINDS or self.rope_factor < 1:
            raise ValueError(
                f"rope_kind is {self.rope_kind!r} with rope_factor {self.rope_factor}; it must be one of "
                f"{', '.join(layers.ROPE_KINDS)} with a factor of at least 1"
            )
        if self.remat_keeps not in decoder.KEEPS:
            raise ValueError(f"remat_keeps is {self.remat_keeps!r}; it must be one of {', '.join(decoder.KEEPS)}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; rotary positions need an even number")

    @property
    def torch_sizes(self) -> dict[str, int]:
        """Sizes that the rules of `TORCH_NAMES` split axes by."""
        return {"H": self.num_heads, "K": self.num_kv_heads, "d": self.head_dim}

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Qwen2Config:
        """From the dict of a released `config.json`.

        Raises:
          ValueError: a size is missing, or the file asks for something this module does not do.
        """
        names = {
            "vocab_size": "vocab_size",
            "hidden_size": "embed_dim",
            "intermediate_size": "mlp_dim",
            "num_hidden_layers": "num_layers",
            "num_attention_heads": "num_heads",
            "num_key_value_heads": "num_kv_heads",
            "rope_theta": "rope_theta",
            "rms_norm_eps": "norm_eps",
            "max_position_embeddings": "max_positions",
        }
        missing = [name for name in names if name not in config]
        if missing:
            raise ValueError(f"config.json lacks {', '.join(missing)}; a Qwen2 configuration has {', '.join(names)}")
        if config.get("hidden_act", "silu") != "silu" or config.get("use_sliding_window", False):
            raise ValueError(
                f"config.json has hidden_act={config.get('hidden_act')!r}, "
                f"use_sliding_window={config.get('use_sliding_window')!r}; only silu and full attention are built"
            )
        ours = {ours: config[theirs] for theirs, ours in names.items()}
        head_dim = config.get("head_dim") or ours["embed_dim"] // ours["num_heads"]
        ours |= {name: float(ours[name]) for name in ("rope_theta", "norm_eps")}
        return cls(
            **ours,
            head_dim=head_dim,
            tied=bool(config.get("tie_word_embeddings", False)),
            init_std=float(config.get("initializer_range", 0.02)),
            **rope_scaling(config, ("yarn",)),
        )

    def build(self, *, rngs: nnx.Rngs) -> Qwen2:
        """The language model with random weights."""
        return Qwen2(self, rngs=rngs)

    def block(self, *, rngs: nnx.Rngs) -> Block:
        """One decoder layer with random weights."""
        return Block(self, Attention(self, rngs=rngs), rngs=rngs)


def rope_scaling(config: Mapping[str, Any], built: Sequence[str]) -> dict[str, Any]:
    """Our fields of the `rope_scaling` of a `config.json`, in its old and its new spelling.

    Raises:
      ValueError: a scaling that this architecture does not have.
    """
    given = config.get("rope_scaling") or {}
    kind = given.get("rope_type", given.get("type", "default"))
    if kind == "default":
        return {}
    extra = {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"} & {
        key for key, value in given.items() if value is not None
    }
    if kind not in built or extra or not isinstance(given.get("factor"), int | float):
        raise ValueError(
            f"config.json has rope_scaling {dict(given)!r}; built are {', '.join(built)}, each with a factor and "
            "its usual constants; set rope_scaling to null to go without"
        )
    original = given.get("original_max_position_embeddings") or config.get("max_position_embeddings", 32768)
    return {"rope_kind": kind, "rope_factor": float(given["factor"]), "rope_original": int(original)}


_7B = Qwen2Config(
    vocab_size=152064, embed_dim=3584, mlp_dim=18944, num_layers=28, num_heads=28, num_kv_heads=4, head_dim=128
)
_HICO_NANO = Qwen2Config(
    vocab_size=1024, embed_dim=256, mlp_dim=1024, num_layers=8, num_heads=4, num_kv_heads=2, head_dim=64, tied=True,
    init_std=0.06,
)  # fmt: skip
VARIANTS = {
    "qwen2-7b": _7B,
    "qwen2.5-7b": _7B,
    "qwen2.5-7b-1m": dataclasses.replace(_7B, rope_theta=1e7, norm_eps=1e-5, max_positions=1_010_000),
    "qwen2.5-1.5b": Qwen2Config(
        vocab_size=151936,
        embed_dim=1536,
        mlp_dim=8960,
        num_layers=28,
        num_heads=12,
        num_kv_heads=2,
        head_dim=128,
        tied=True,
    ),
    "nano": Qwen2Config(
        vocab_size=512,
        embed_dim=128,
        mlp_dim=384,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        tied=True,
        init_std=0.1,
    ),
    "hico-nano": _HICO_NANO,
    "tiny": Qwen2Config(
        vocab_size=64, embed_dim=32, mlp_dim=48, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8, tied=True
    ),
}


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions; q, k and v have biases."""

    def __init__(self, config: Qwen2Config, *, rngs: nnx.Rngs) -> None:
        dim, heads, kv_heads, width = config.embed_dim, config.num_heads, config.num_kv_heads, config.head_dim

        def weight(shape: tuple[int, ...], *axes: str) -> nnx.Param:
            return layers.param(layers.normal(rngs, shape, config.init_std), axes)

        self.wq = weight((dim, heads, width), "embed", "heads", "head_dim")
        self.wk = weight((dim, kv_heads, width), "embed", "kv_heads", "head_dim")
        self.wv = weight((dim, kv_heads, width), "embed", "kv_heads", "head_dim")
        self.wo = weight((heads, width, dim), "heads", "head_dim", "embed")
        self.bq = layers.param(jnp.zeros((heads, width)), ("heads", "head_dim"))
        self.bk = layers.param(jnp.zeros((kv_heads, width)), ("kv_heads", "head_dim"))
        self.bv = layers.param(jnp.zeros((kv_heads, width)), ("kv_heads", "head_dim"))

    def query_key(
        self, x: Float[Array, "B L D"], place: Place
    ) -> tuple[Float[Array, "B L H d"], Float[Array, "B L K d"]]:
        """Rotated queries and keys."""
        q = layers.rotate(_project(x, self.wq, self.bq), place.cos, place.sin)
        k = layers.rotate(_project(x, self.wk, self.bk), place.cos, place.sin)
        return shard(q, "batch", "length", "heads", None), shard(k, "batch", "length", "kv_heads", None)

    def value(self, x: Float[Array, "B L D"]) -> Float[Array, "B L K d"]:
        return shard(_project(x, self.wv, self.bv), "batch", "length", "kv_heads", None)

    def query_key_value(self, x: Any, place: Place) -> tuple[Array, Array, Array]:
        """`query_key` and `value` together: of a single token one kernel reads all three weights."""
        weights, biases = (self.wq[...], self.wk[...], self.wv[...]), (self.bq[...], self.bk[...], self.bv[...])
        q, k, v = contract_all("BLD,DHd->BLHd", x, weights, biases)
        q, k = (layers.rotate(a, place.cos, place.sin) for a in (q, k))
        heads = ("heads", "kv_heads", "kv_heads")
        q, k, v = (shard(a, "batch", "length", axis, None) for a, axis in zip((q, k, v), heads, strict=True))
        return q, k, v

    def out(self, mixed: Float[Array, "B L H d"], add: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        """The heads joined again, and the stream they are added to."""
        return contract("BLHd,HdD->BLD", mixed, self.wo[...], add)


def _project(x: Array, weight: nnx.Param, bias: nnx.Param) -> Array:
    return contract("BLD,DHd->BLHd", x, weight[...]) + bias[...].astype(x.dtype)


class MLP(nnx.Module):
    """`down(silu(gate(x)) * up(x))`."""

    def __init__(self, config: Qwen2Config, *, rngs: nnx.Rngs) -> None:
        inward, outward = (config.embed_dim, config.mlp_dim), (config.mlp_dim, config.embed_dim)
        self.gate = layers.param(layers.normal(rngs, inward, config.init_std), ("embed", "mlp"))
        self.up = layers.param(layers.normal(rngs, inward, config.init_std), ("embed", "mlp"))
        self.down = layers.param(layers.normal(rngs, outward, config.init_std), ("mlp", "embed"))

    def __call__(self, x: Any, add: Float[Array, "B L D"] | None = None) -> Float[Array, "B L D"]:
        return contract("BLF,FD->BLD", gated("BLD,DF->BLF", x, self.gate[...], self.up[...]), self.down[...], add)


class Block(nnx.Module):
    """One decoder layer: attention and MLP, each behind a norm."""

    def __init__(self, config: Qwen2Config, attn: Any, *, rngs: nnx.Rngs) -> None:
        self.input_norm = layers.RMSNorm(config.embed_dim, eps=config.norm_eps)
        self.attn = attn
        self.post_norm = layers.RMSNorm(config.embed_dim, eps=config.norm_eps)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(self, x: Float[Array, "B L D"], place: Place) -> tuple[Float[Array, "B L D"], tuple[Array, Array]]:
        """The layer's output, and the keys and values a cache would hold."""
        normed = self.input_norm(x)
        q, k = self.attn.query_key(normed, place)
        v = self.attn.value(normed)
        mixed = attention.attend(
            q, k, v, q_positions=place.positions, k_positions=place.positions,
            q_segments=place.segments, k_segments=place.segments, plain=place.plain,
        )  # fmt: skip
        x = self.attn.out(mixed, x)
        return x + layers.in_slices(lambda x: self.mlp(self.post_norm(x)), x, place.slice), (k, v)

    def attention_query_key(self, x: Float[Array, "B L D"], place: Place) -> tuple[Array, Array]:
        """What this layer would ask and answer: the norm, q, k and rotation, for scoring tokens before it runs."""
        return self.attn.query_key(self.input_norm(x), place)

    def decode(
        self,
        x: Float[Array, "B 1 D"],
        place: Place,
        keys: Array,
        values: Array,
        layer: Array,
        at: tuple[Array, int],
        visible: Bool[Array, "B S"],
    ) -> tuple[Float[Array, "B 1 D"], Array, Array]:
        """One token against the cache of its group, `at` its step and room; returns the stacks with it written in."""
        q, k, v = self.attn.query_key_value(self.input_norm.ahead(x), place)
        keys, values = kv_cache.write(keys, layer, *at, k), kv_cache.write(values, layer, *at, v)
        mixed = attention.attend_one(q.astype(keys.dtype), keys, values, visible, layer)
        x = self.attn.out(mixed, x)
        return self.mlp(self.post_norm.ahead(x), x), keys, values

    def extend(
        self,
        x: Float[Array, "B Q D"],
        place: Place,
        keys: Array,
        values: Array,
        layer: Array,
        at: int | Int[Array, ""],
        segments: Int[Array, "B S"],
        lane: Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B Q D"], Array, Array]:
        """`decode` for several tokens, written from place `at` on, which see what stands before them.

        `segments` are those of the cache's first places, behind which nothing is looked at; with `lane` of that row.
        """
        q, k, v = self.attn.query_key_value(self.input_norm(x), place)
        keys, values = (kv_cache.write_at(a, layer, at, b, lane) for a, b in ((keys, k), (values, v)))
        k, v = (kv_cache.read(a, layer, segments.shape[1], lane) for a in (keys, values))
        if lane is None and not place.plain:
            mixed = attention.attend_some(q, k, v, place.segments, segments, at)
        else:
            mixed = attention.attend_piece(q, k, v, at)
        x = self.attn.out(mixed, x)
        return x + layers.in_slices(lambda x: self.mlp(self.post_norm(x)), x, place.slice), keys, values

    def step(
        self,
        x: Float[Array, "R 1 D"],
        place: Place,
        keys: Array,
        values: Array,
        layer: Array,
        rows: Int[Array, " R"] | None,
        at: Int[Array, " R"],
        visible: Bool[Array, "R S"],
    ) -> tuple[Float[Array, "R 1 D"], Array, Array]:
        """`decode` for lanes that are filled differently far (`lanes.step`); places beyond `visible` are not read."""
        q, k, v = self.attn.query_key_value(self.input_norm.ahead(x), place)
        keys, values = (lanes.write_rows(a, layer, rows, at, b) for a, b in ((keys, k), (values, v)))
        q = q.astype(keys.dtype)
        if rows is None and visible.shape[1] == keys.shape[3]:
            mixed = attention.attend_one(q, keys, values, visible, layer)
        else:
            k, v = (lanes.read_rows(a, layer, rows, visible.shape[1]) for a in (keys, values))
            mixed = attention.attend_one(q, k, v, visible)
        x = self.attn.out(mixed, x)
        return self.mlp(self.post_norm.ahead(x), x), keys, values


class Qwen2(nnx.Module):
    """Embedding, stacked blocks, last norm, unembedding."""

    def __init__(self, config: Qwen2Config, *, rngs: nnx.Rngs) -> None:
        self.config = config
        size = (config.vocab_size, config.embed_dim)
        self.embedding = layers.param(layers.normal(rngs, size, config.init_std), ("vocab", "embed"))
        self.blocks = layers.stack(lambda rngs: config.block(rngs=rngs), config.num_layers, rngs)
        self.norm = layers.RMSNorm(config.embed_dim, eps=config.norm_eps)
        self.unembedding = (
            None if config.tied else layers.param(layers.normal(rngs, size[::-1], config.init_std), ("embed", "vocab"))
        )

    def __call__(
        self,
        stream: Stream,
        plan: DropPlan | None,
        *,
        schedule: DropSchedule = NO_DROP,
        cache_room: int = 0,
        piece: int = 0,
    ) -> tuple[Stream, kv_cache.Cache | None]:
        """All layers and the last norm; with `cache_room`, also a cache with that many free places.

        `piece` tokens run at a time where there is a cache (0: all).
        """
        stream, cache, _ = decoder.run(
            self.blocks,
            stream,
            plan,
            schedule=schedule,
            angles=self.angles,
            remat=self.config.remat_keeps if self.config.remat else "",
            cache_room=cache_room,
            piece=piece,
        )
        return stream.replace(x=self.norm(stream.x)), cache

    def decode(self, x: Float[Array, "B 1 D"], cache: kv_cache.Cache) -> tuple[Float[Array, "B 1 D"], kv_cache.Cache]:
        """One more token of every row; returns its hidden state and the cache that holds it."""
        x, cache = decoder.decode(self.blocks, x, cache, angles=self.angles)
        return self.norm(x), cache

    def remember(
        self, stream: Stream, plan: DropPlan | None, *, schedule: DropSchedule = NO_DROP, room: int
    ) -> reuse.Memory:
        """What no question changes of a prompt's beginning; see `reuse.py`."""
        return reuse.remember(self.blocks, stream, plan, schedule=schedule, angles=self.angles, room=room)

    def resume(
        self, memory: reuse.Memory, question: Stream, plan: DropPlan | None, *, schedule: DropSchedule = NO_DROP
    ) -> tuple[Stream, kv_cache.Cache]:
        """A question behind what is remembered, and the last norm."""
        stream, cache = reuse.resume(self.blocks, memory, question, plan, schedule=schedule, angles=self.angles)
        return stream.replace(x=self.norm(stream.x)), cache

    def extend(self, *args: Any, **static: Any) -> tuple[Array, lanes.Lanes, Array]:
        """A piece of one lane's prompt through a group of layers: `lanes.extend` from its second argument on."""
        return lanes.extend(self.blocks, *args, **static, angles=self.angles)

    def step(
        self, held: lanes.Lanes, x: Float[Array, "R 1 D"], rows: Int[Array, " R"] | None, lengths: Int[Array, "G R"],
        *, seen: int | None = None,
    ) -> tuple[Float[Array, "R 1 D"], lanes.Lanes]:  # fmt: skip
        """One more token of several lanes; returns its hidden state and the lanes that hold it."""
        x, held = lanes.step(self.blocks, held, x, rows, lengths, seen=seen, angles=self.angles)
        return self.norm(x), held

    def select(self, *args: Any, **static: Any) -> tuple[Array, Array, Array]:
        """An attention-guided stage for one lane: `lanes.select` from its second argument on."""
        return lanes.select(self.blocks, *args, **static, angles=self.angles)

    def attended(self, *args: Any, **static: Any) -> Float[Array, " S"]:
        """What a lane's last token looks at: `lanes.attended` from its second argument on."""
        return lanes.attended(self.blocks, *args, **static, angles=self.angles)

    def trace(self, stream: Stream, plan: DropPlan, *, schedule: DropSchedule) -> tuple[decoder.Stage, ...]:
        """Which tokens are alive after each stage of the drop, and the scores that chose them."""
        return decoder.run(self.blocks, stream, plan, schedule=schedule, angles=self.angles)[2]

    def angles(self, positions: Int[Array, "B L"]) -> tuple[Float[Array, "B L d"], Float[Array, "B L d"]]:
        """cos and sin of the rotary angles, float32."""
        config = self.config
        return layers.rotary_angles(
            positions, config.head_dim, config.rope_theta,
            kind=config.rope_kind, factor=config.rope_factor, original=config.rope_original,
        )  # fmt: skip

    def embed(self, tokens: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        table: Any = self.embedding[...]
        return table.take(tokens, self.norm.scale[...].dtype) if isinstance(table, Packed) else lookup(table, tokens)

    def unembed_weight(self) -> Any:
        """Float[D V]: what hidden states are multiplied by to give logits. A packed embedding lies that way already."""
        table: Any = self.embedding[...] if self.unembedding is None else self.unembedding[...]
        return table.T if self.unembedding is None and not isinstance(table, Packed) else table

    def logits(self, x: Float[Array, "B L D"]) -> Float[Array, "B L V"]:
        """Float32 logits of hidden states. Hand in few positions: the vocabulary is wide."""
        return contract("BLD,DV->BLV", x, self.unembed_weight(), dtype=jnp.float32)


TORCH_NAMES = (
    Rule("model.embed_tokens.weight", "llm/embedding"),
    Rule("model.layers.{i}.input_layernorm.weight", "llm/blocks/input_norm/scale"),
    Rule("model.layers.{i}.self_attn.q_proj.weight", "llm/blocks/attn/wq", "(H d) D -> D H d"),
    Rule("model.layers.{i}.self_attn.q_proj.bias", "llm/blocks/attn/bq", "(H d) -> H d"),
    Rule("model.layers.{i}.self_attn.k_proj.weight", "llm/blocks/attn/wk", "(K d) D -> D K d"),
    Rule("model.layers.{i}.self_attn.k_proj.bias", "llm/blocks/attn/bk", "(K d) -> K d"),
    Rule("model.layers.{i}.self_attn.v_proj.weight", "llm/blocks/attn/wv", "(K d) D -> D K d"),
    Rule("model.layers.{i}.self_attn.v_proj.bias", "llm/blocks/attn/bv", "(K d) -> K d"),
    Rule("model.layers.{i}.self_attn.o_proj.weight", "llm/blocks/attn/wo", "D (H d) -> H d D"),
    Rule("model.layers.{i}.post_attention_layernorm.weight", "llm/blocks/post_norm/scale"),
    Rule("model.layers.{i}.mlp.gate_proj.weight", "llm/blocks/mlp/gate", "F D -> D F"),
    Rule("model.layers.{i}.mlp.up_proj.weight", "llm/blocks/mlp/up", "F D -> D F"),
    Rule("model.layers.{i}.mlp.down_proj.weight", "llm/blocks/mlp/down", "D F -> F D"),
    Rule("model.norm.weight", "llm/norm/scale"),
    Rule("lm_head.weight", "llm/unembedding", "V D -> D V", optional=True),
)
