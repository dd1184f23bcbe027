"""Progressive dropout: each function by hand, then the recorded reference, then rows the reference cannot run."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from data_pipeline.drop import plan_drop
from hico_jax.batch import Batch, DropSchedule
from hico_jax.models.compress import progressive
from hico_jax.models.llm import decoder, qwen2
from hico_jax.models.llm.decoder import Stream

IGNORED = -100


def test_positions_count_anew_in_each_segment() -> None:
    segments = jnp.asarray([[1, 1, 1, 2, 2, 0, 0]])
    np.testing.assert_array_equal(progressive.renumber(segments), [[0, 1, 2, 0, 1, 0, 0]])


def test_the_last_token_of_each_segment_asks_in_generation() -> None:
    segments = jnp.asarray([[1, 1, 2, 2, 0], [1, 1, 1, 1, 1]])
    asks = progressive.queries(segments, None, 0)
    np.testing.assert_array_equal(asks, [[0, 1, 0, 1, 0], [0, 0, 0, 0, 1]])


@pytest.mark.parametrize(
    ("labelled", "expected"),
    [
        ([0, 0, 1, 1, 0, 1], [0, 1, 0, 0, 1, 0]),  # before each answer
        ([1, 0, 0, 1, 1, 0], [0, 0, 1, 0, 0, 1]),  # first labelled, last not: the last asks too
        ([1, 0, 0, 0, 1, 1], [0, 0, 0, 1, 0, 0]),  # first and last labelled: no wrap
        ([0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]),
    ],
)
def test_training_queries_stand_before_answers(labelled: list[int], expected: list[int]) -> None:
    """The same row alone, and as a second segment before padding."""
    alone = progressive.queries(jnp.ones((1, 6), jnp.int32), jnp.asarray([labelled], bool), 3)
    np.testing.assert_array_equal(alone[0], expected)
    segments = jnp.asarray([[1] * 2 + [2] * 6 + [0] * 2])
    packed = progressive.queries(segments, jnp.asarray([[0, 0, *labelled, 0, 0]], bool), 3)
    np.testing.assert_array_equal(packed[0], [0, 0, *expected, 0, 0])


def test_best_keeps_text_and_the_highest_scores_and_breaks_ties_early() -> None:
    scores = jnp.asarray([[9.0, 0.1, 0.3, 0.3, 0.3, 9.0, 0.5, 0.2, 9.0]])
    slots = jnp.asarray([[-1, 0, 1, 2, 3, -1, 4, 5, -1]])
    segments = jnp.asarray([[1, 1, 1, 1, 1, 2, 2, 2, 0]])
    alive = progressive.best(scores, slots, segments, jnp.asarray([[2, 1]]))
    np.testing.assert_array_equal(alive, [[1, 0, 1, 1, 0, 1, 1, 0, 0]])
    everything = progressive.best(scores, slots, segments, jnp.asarray([[4, 2]]))
    np.testing.assert_array_equal(everything, segments != 0)


def test_compact_moves_the_living_to_the_front_in_order() -> None:
    alive = jnp.asarray([[0, 1, 0, 1, 1], [1, 0, 0, 0, 0]], bool)
    index, real = progressive.compact(alive, 4)
    np.testing.assert_array_equal(real, [[1, 1, 1, 0], [1, 0, 0, 0]])
    x = jnp.arange(10.0).reshape(2, 5)
    np.testing.assert_array_equal(progressive.take(x, index, real), [[1, 3, 4, 0], [5, 0, 0, 0]])


def test_scores_equal_the_whole_attention_array_averaged() -> None:
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.normal(size=(1, 8, 4, 4)), jnp.float32)
    k = jnp.asarray(rng.normal(size=(1, 8, 2, 4)), jnp.float32)
    segments = np.array([[1, 1, 1, 2, 2, 2, 2, 0]])
    positions = np.array([[0, 1, 2, 0, 1, 2, 3, 0]])
    asks = np.array([[0, 0, 1, 0, 1, 0, 1, 0]], bool)
    got = progressive.scores(q, k, *(jnp.asarray(a) for a in (positions, segments, asks)), 4)
    expected = np.zeros(8)
    for segment, queries in ((1, [2]), (2, [4, 6])):
        for i in queries:
            keys = [j for j in range(i + 1) if segments[0, j] == segment]
            for h in range(4):
                weights = np.exp(np.array([q[0, i, h] @ k[0, j, h // 2] for j in keys]) / 2)
                expected[keys] += weights / weights.sum() / 4 / len(queries)
    np.testing.assert_allclose(got[0], expected, atol=1e-6)  # float32 rounding of weights below one


def schedule_of(config: dict[str, Any]) -> DropSchedule:
    if not config["llm_compress_layer_list"]:
        return DropSchedule()
    ratios = tuple(config["llm_image_token_ratio_list"])
    return DropSchedule(config["llm_compress_type"], tuple(config["llm_compress_layer_list"]), ratios)


def prompt_of(model: qwen2.Qwen2, tensors: dict[str, np.ndarray], config: dict[str, Any]) -> Stream:
    """The recorded prompt: text, visual tokens, text."""
    ids, before, count = tensors["text_ids"].astype(np.int32), config["pre"], config["num_image_tokens"]
    text = model.embed(jnp.asarray(ids)[None])
    visual = jnp.asarray(tensors["image_embeds"])[None]
    length = len(ids) + count
    slots = np.full((1, length), -1, np.int32)
    slots[0, before : before + count] = np.arange(count)
    return Stream(
        x=jnp.concatenate([text[:, :before], visual, text[:, before:]], axis=1),
        positions=jnp.arange(length, dtype=jnp.int32)[None],
        segments=jnp.ones((1, length), jnp.int32),
        slots=jnp.asarray(slots),
    )


@pytest.mark.parity
@pytest.mark.parametrize(
    "kind", ["attention_1_3_4", "uniform_1_3_4", "uniform0_attention_1_3_4", "uniform1_attention_1_3_4", "attention_4"]
)
def test_prompts_keep_what_the_reference_keeps(kind: str, golden: Any, golden_llm: Any, make_plan: Any) -> None:
    case = golden.case("E_llm", f"compress_{kind}")
    tensors, model, schedule = golden.tensors(case["file"]), golden_llm(), schedule_of(case["config"])
    stream = prompt_of(model, tensors, case["config"])
    plan = make_plan(stream, schedule, training=False, margin=3)  # padding must change nothing
    stream = stream.replace(survives=plan.survives)

    @jax.jit
    def run(model: qwen2.Qwen2, stream: Stream, plan: Any) -> Any:
        end, _, stages = decoder.run(model.blocks, stream, plan, schedule=schedule, angles=model.angles)
        return model.norm(end.x) @ model.unembed_weight(), stages

    logits, stages = run(model, stream, plan)
    before = np.asarray(stream.slots[0])
    for s, stage in enumerate(stages):
        after = np.asarray(stage.stream.slots[0])
        kept = np.searchsorted(before[before >= 0], after[after >= 0])
        np.testing.assert_array_equal(kept, tensors[f"stage{s}.sel0.kept"])
        length = tensors[f"stage{s}.position_ids"].shape[1]
        np.testing.assert_array_equal(stage.stream.positions[:, :length], tensors[f"stage{s}.position_ids"])
        if f"stage{s}.sel0.scores" in tensors:
            scores = np.asarray(stage.scores[0])[np.flatnonzero(before >= 0)]
            np.testing.assert_allclose(scores, tensors[f"stage{s}.sel0.scores"], rtol=1e-4)  # float32 softmax
        if f"stage{s}.features" in tensors:
            # float32 and float64 references differ by 2e-5 in logits; hidden states are of the same size
            np.testing.assert_allclose(stage.stream.x[:, :length], tensors[f"stage{s}.features"], atol=5e-5)
        before = after
    np.testing.assert_allclose(logits[0, : len(tensors["prefill_logits"])], tensors["prefill_logits"], atol=1e-4)


def training_stream(model: qwen2.Qwen2, tensors: dict[str, np.ndarray], samples: list[dict[str, int]]) -> Stream:
    """The recorded rows with targets and weights by the contract of `Batch`."""
    labels, mask = tensors["labels_in"], tensors["attention_mask_in"].astype(np.int32)
    rows, length = labels.shape
    slots = np.full((rows, length), -1, np.int32)
    x = []
    for b, sample in enumerate(samples):
        before, count = sample["pre"], sample["n_image"]
        text = model.embed(jnp.asarray(tensors[f"text_ids{b}"].astype(np.int32))[None])[0]
        row = jnp.concatenate([text[:before], jnp.asarray(tensors[f"image_embeds{b}"]), text[before:]])
        x.append(jnp.pad(row, ((0, length - len(row)), (0, 0))))
        slots[b, before : before + count] = np.arange(count)
    following = np.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORED)
    for b, sample in enumerate(samples):
        run = slice(sample["pre"], sample["pre"] + sample["n_image"])
        following[b, run] = following[b, run.stop - 1]
    weights = (following != IGNORED).astype(np.float32)
    return Stream(
        x=jnp.stack(x),
        positions=jnp.asarray(np.where(mask, np.arange(length), 0).astype(np.int32)),
        segments=jnp.asarray(mask),
        slots=jnp.asarray(slots),
        targets=jnp.asarray(np.where(weights > 0, following, 0).astype(np.int32)),
        weights=jnp.asarray(weights),
        labelled=jnp.asarray(labels != IGNORED),
    )


@pytest.mark.parity
@pytest.mark.parametrize(
    "kind",
    [
        "nocompress",
        "attention_qwenlabels",
        "uniform0_attention",
        "attention_edge",
        pytest.param("attention", marks=pytest.mark.slow),  # the others hold what these two hold
        pytest.param("uniform", marks=pytest.mark.slow),
    ],
)
def test_training_equals_the_reference(kind: str, golden: Any, golden_llm: Any, make_plan: Any) -> None:
    case = golden.case("E_llm", f"train_{kind}")
    config, tensors, model = case["config"], golden.tensors(case["file"]), golden_llm()
    schedule = schedule_of(config)
    stream = training_stream(model, tensors, config["samples"])
    plan = make_plan(stream, schedule, training=True)
    stream = stream.replace(survives=plan.survives)

    is_text = ((stream.slots < 0) & (stream.segments > 0))[..., None]
    tokens = jnp.asarray(tokens_of(stream, tensors))

    def loss(model: qwen2.Qwen2, stream: Stream, plan: Any) -> Any:
        stream = stream.replace(x=jnp.where(is_text, model.embed(tokens), stream.x))
        end, _, stages = decoder.run(model.blocks, stream, plan, schedule=schedule, angles=model.angles)
        logits = model.norm(end.x) @ model.unembed_weight()
        nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), end.targets[..., None], axis=-1)[..., 0]
        return (nll * end.weights).sum() / end.weights.sum(), (end, stages)

    (value, (end, stages)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(model, stream, plan)

    before = np.asarray(stream.slots)
    for s, stage in enumerate(stages):
        after = np.asarray(stage.stream.slots)
        compressed = 0
        for b in range(len(after)):
            was, now = before[b][before[b] >= 0], after[b][after[b] >= 0]
            if len(was) == len(now):
                continue  # the reference recorded nothing for a row it left alone
            np.testing.assert_array_equal(np.searchsorted(was, now), tensors[f"stage{s}.sel{compressed}.kept"])
            compressed += 1
        assert f"stage{s}.sel{compressed}.kept" not in tensors
        np.testing.assert_array_equal(stage.stream.positions, tensors[f"stage{s}.position_ids"])
        np.testing.assert_array_equal(stage.stream.segments, tensors[f"stage{s}.attention_mask"])
        before = after
    labels = np.where(np.asarray(end.weights) > 0, np.asarray(end.targets), IGNORED)
    np.testing.assert_array_equal(labels[:, :-1], tensors["labels_after_compress"][:, 1:])
    np.testing.assert_allclose(value, tensors["loss"], rtol=1e-5)  # float64 and float32 references differ by 2e-6

    torch_grads = to_torch(grads)
    norms = [np.linalg.norm(torch_grads[name]) for name in config["grad_norm_names"]]
    np.testing.assert_allclose(norms, tensors["grad_norms"], rtol=1e-3)
    for name, expected in tensors.items():
        if name.startswith("grad."):
            got = torch_grads[name.removeprefix("grad.")]
            np.testing.assert_allclose(got, expected, atol=1e-4 * np.abs(expected).max())


def tokens_of(stream: Stream, tensors: dict[str, np.ndarray]) -> np.ndarray:
    """Text ids in row layout, so that the embedding's gradient can be taken."""
    slots, segments = np.asarray(stream.slots), np.asarray(stream.segments)
    tokens = np.zeros(slots.shape, np.int32)
    for b in range(len(slots)):
        tokens[b, (slots[b] < 0) & (segments[b] > 0)] = tensors[f"text_ids{b}"]
    return tokens


def to_torch(model: qwen2.Qwen2) -> dict[str, np.ndarray]:
    """Every tensor of a model (here gradients) under its torch name."""
    out = {}
    for rule in qwen2.TORCH_NAMES:
        node: Any = model
        for part in rule.path.split("/")[1:]:
            node = getattr(node, part)
        value = np.asarray(node[...])
        named = (
            {rule.torch.replace("{i}", str(i)): v for i, v in enumerate(value)} if rule.stacked else {rule.torch: value}
        )
        out |= {name: rule.to_torch(v, model.config.torch_sizes) for name, v in named.items()}
    return out


def mixed_rows(seed: int) -> tuple[qwen2.Qwen2, Stream]:
    """Four rows: one video, two packed samples, several images, text only; right-padded to different lengths."""
    model = qwen2.VARIANTS["tiny"].build(rngs=nnx.Rngs(seed))
    rows = [
        [(1, "tttvvvvvvvvvvtttt")],
        [(1, "tvvvvvvtt"), (2, "ttvvvvvvvvtat")],
        [(1, "tvvvvttvvvvvvtaa")],
        [(1, "ttttt")],
    ]
    length = 24
    arrays = {n: np.zeros((len(rows), length), np.int32) for n in ("segments", "positions", "labelled")}
    arrays["slots"] = np.full((len(rows), length), -1, np.int32)
    for b, row in enumerate(rows):
        at = 0
        for segment, text in row:
            for i, kind in enumerate(text):
                arrays["segments"][b, at + i], arrays["positions"][b, at + i] = segment, i
                arrays["labelled"][b, at + i] = kind == "a"
                if kind == "v":
                    arrays["slots"][b, at + i] = arrays["slots"][b].max() + 1
            at += len(text)
    x = jax.random.normal(jax.random.key(seed), (len(rows), length, model.config.embed_dim))
    x = jnp.where((arrays["segments"] > 0)[..., None], x, 0.0)
    stream = Stream(x=x, **{n: jnp.asarray(a) for n, a in arrays.items()})
    return model, stream.replace(labelled=stream.labelled.astype(bool))


@pytest.mark.parametrize("training", [False, True])
def test_every_segment_of_a_mixed_batch_equals_itself_alone(training: bool, make_plan: Any) -> None:
    """The reference asserts one video a row. The rule must not depend on who shares the row or the batch."""
    model, stream = mixed_rows(0)
    schedule = DropSchedule("uniform0_attention", (1, 2), (1.0, 0.6, 0.3))

    plan = make_plan(stream, schedule, training=training, margin=2)

    @jax.jit
    def run(stream: Stream, own: Any) -> Stream:
        shared = dataclasses.replace(own, lengths=plan.lengths, num_queries=plan.num_queries)  # one program for all
        return model(stream.replace(survives=own.survives), shared, schedule=schedule)[0]

    together = run(stream, plan)
    host = jax.tree.map(np.asarray, stream)  # each segment has a length of its own: nothing is compiled for it
    for b in range(4):
        for segment in range(1, int(stream.segments[b].max()) + 1):
            mine = np.flatnonzero(np.asarray(stream.segments[b]) == segment)
            take = lambda a, b=b, mine=mine: np.concatenate([a[b, mine], np.zeros_like(a[b, len(mine) :])])[None]
            single = jax.tree.map(take, host)
            real = np.arange(single.slots.shape[1]) < len(mine)
            single = single.replace(segments=real[None].astype(np.int32), slots=np.where(real, single.slots, -1))
            own = make_plan(single, schedule, training=training)
            alone = run(single, dataclasses.replace(own, lengths=(), num_queries=0))
            whole, kept = np.asarray(together.segments[b]) == segment, np.asarray(alone.segments[0]) == 1
            found, single = jax.tree.map(np.asarray, (together, alone))
            np.testing.assert_array_equal(found.slots[b][whole], single.slots[0][kept])
            np.testing.assert_array_equal(found.positions[b][whole], single.positions[0][kept])
            # the same sums in another order: float32 rounding
            np.testing.assert_allclose(found.x[b][whole], single.x[0][kept], atol=1e-5)


@pytest.mark.parametrize("kind", ["uniform", "attention", "uniform1_attention"])
@pytest.mark.parametrize("training", [False, True])
def test_the_host_plans_as_by_hand(kind: str, training: bool, make_plan: Any) -> None:
    """The loops of conftest and `data_pipeline` agree on who stays, so these tests speak of what really runs."""
    _, stream = mixed_rows(0)
    schedule = DropSchedule(kind, (1, 2), (1.0, 0.6, 0.3))
    expected = make_plan(stream, schedule, training=training)
    rows = Batch(
        tokens=np.zeros_like(stream.slots), slots=stream.slots, positions=stream.positions, segments=stream.segments,
        targets=stream.targets, weights=stream.weights, clips=None, images=None,
    )  # fmt: skip
    got = plan_drop(rows, schedule, labelled=np.asarray(stream.labelled), training=training)
    real = np.asarray(stream.slots) >= 0
    np.testing.assert_array_equal(np.asarray(got.survives)[real], np.asarray(expected.survives)[real])
    np.testing.assert_array_equal(got.keep, expected.keep)
    assert got.lengths == expected.lengths
    assert got.num_queries == expected.num_queries
