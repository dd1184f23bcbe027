from __future__ import annotations

import numpy as np
import pytest

from data_pipeline import drop
from hico_jax.batch import Batch, DropSchedule, Geometry


def test_recorded_even_indices(golden):
    stored = golden.json("E_llm_uniform_indices.json")
    for case in stored["rows"]:
        assert int(case["num_image_tokens"] * case["ratio_to"]) == case["keep_length"]
    for case in stored["rows"] + stored["raw"]:
        chosen = list(drop.even_indices(case["image_tokens"], case["keep_length"]))
        if "indices" in case:
            assert chosen == case["indices"], case
        else:
            head, tail = case["indices_head"], case["indices_tail"]
            assert chosen[: len(head)] == head
            assert chosen[-len(tail) :] == tail


@pytest.mark.parametrize(
    ("num", "kept", "total"),
    [(1024, 512, 261633), (1024, 768, 392449), (768, 256, 98049), (2048, 1536, 1571329), (1200, 400, 239601)],
)
def test_published_sums(num, kept, total):
    assert sum(drop.even_indices(num, kept)) == total


def test_edges():
    assert drop.even_indices(5, 0) == ()
    assert drop.even_indices(5, 1) == (0,)
    assert drop.even_indices(5, 5) == (0, 1, 2, 3, 4)


def batch(*, text=6, clips=2):
    geometry = Geometry(image_px=4, frames_per_clip=4, tokens_per_clip=8, tokens_per_image=4, max_length=99)
    return Batch.fake(geometry, rows=2, clips=clips, text=text)


def test_a_uniform_plan_written_out():
    made = batch(clips=1)  # four text tokens, eight visual, two text
    plan = drop.plan_drop(made, DropSchedule("uniform", (1, 2), (1.0, 0.5, 0.25)))
    once, twice = drop.even_indices(8, 4), drop.even_indices(4, 2)
    expected = np.zeros(8, int)
    expected[list(once)] = 1
    expected[[once[i] for i in twice]] = 2
    assert plan.survives[0, 4:12].tolist() == expected.tolist()
    assert set(plan.survives[:, :4].ravel()) == {127}
    assert plan.keep.tolist() == [[[4, 2]]] * 2
    assert plan.lengths == (10, 8)


def test_kinds_share_their_even_stages():
    made = batch()
    ratios, layers = (1.0, 0.5, 0.25, 0.125), (1, 2, 3)
    uniform = drop.plan_drop(made, DropSchedule("uniform", layers, ratios)).survives
    for kind, count in (("uniform0_attention", 1), ("uniform1_attention", 2), ("attention", 0)):
        plan = drop.plan_drop(made, DropSchedule(kind, layers, ratios))
        visual = made.slots >= 0
        assert (plan.survives[visual] == np.minimum(uniform[visual], count)).all()
        assert plan.keep.tolist() == [[[8, 4, 2]]] * 2


def test_a_row_that_asks_nothing_stays_whole_at_attention_stages():
    made = batch()
    weights = made.weights.copy()
    weights[0] = 0
    made = made.replace(weights=weights)
    plan = drop.plan_drop(made, DropSchedule("uniform0_attention", (1, 2), (1.0, 0.5, 0.25)))
    assert plan.keep[:, 0].tolist() == [[8, 8], [8, 4]]
    assert plan.lengths == (14, 14)
    assert plan.num_queries == 1
    asked = drop.plan_drop(made, DropSchedule("uniform0_attention", (1, 2), (1.0, 0.5, 0.25)), training=False)
    assert asked.keep[:, 0].tolist() == [[8, 4], [8, 4]]
    assert (asked.num_queries, asked.labelled.any()) == (0, False)


def test_the_last_token_asks_when_the_first_is_a_target():
    labelled = np.array([1, 0, 0, 1, 1, 0], bool)
    assert drop.count_queries(labelled) == 2
    assert drop.count_queries(np.array([1, 0, 1, 1], bool)) == 1


def test_lengths_are_rounded_but_never_beyond_the_row():
    plan = drop.plan_drop(batch(), DropSchedule("uniform", (1,), (1.0, 0.5)), multiple=8)
    assert plan.lengths == (16,)  # 6 text + 8 visual
    assert drop.plan_drop(batch(), DropSchedule("uniform", (1,), (1.0, 0.5)), multiple=128).lengths == (22,)


def test_segments_are_counted_apart():
    made = batch()
    segments = made.segments.copy()
    segments[:, 12:] = 2  # eight visual tokens in each
    segments[1, -2:] = 0
    plan = drop.plan_drop(made.replace(segments=segments), DropSchedule("uniform", (1,), (1.0, 0.25)))
    assert plan.keep.tolist() == [[[2], [2]]] * 2
    assert (plan.survives[0, 4:12] == plan.survives[0, 12:20]).all()
    assert plan.lengths == (10,)


def test_recorded_training_plans(golden):
    """The recorded reference keeps as many tokens, and as long rows, as the host plans."""
    for name in ("train_attention", "train_attention_qwenlabels", "train_attention_edge", "train_uniform"):
        case = golden.case("E_llm", name)
        stored, config = golden.tensors(case["file"]), case["config"]
        labels, mask = stored["labels_in"], stored["attention_mask_in"] > 0
        slots = np.full(labels.shape, -1)
        for b, sample in enumerate(config["samples"]):
            slots[b, sample["pre"] : sample["pre"] + sample["n_image"]] = np.arange(sample["n_image"])
        made = batch().replace(slots=slots, segments=mask.astype(np.int32), weights=np.zeros(labels.shape))
        schedule = DropSchedule(
            config["llm_compress_type"],
            tuple(config["llm_compress_layer_list"]),
            tuple(config["llm_image_token_ratio_list"]),
        )
        plan = drop.plan_drop(made, schedule, labelled=labels != -100)
        assert plan.lengths[-1] == stored["labels_after_compress"].shape[1], name
        lengths = stored["valid_after"].sum(1)
        text = ((slots < 0) & mask).sum(1)
        assert (text + plan.keep[:, 0, -1] == lengths).all(), name
