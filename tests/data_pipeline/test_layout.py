from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from data_pipeline import chat, layout
from data_pipeline.layout import Visual
from data_pipeline.tokenizer import load_tokenizer, train_bpe
from hico_jax.batch import DropSchedule, Geometry

SMALL = Geometry(image_px=2, frames_per_clip=4, tokens_per_clip=4, tokens_per_image=4, max_length=64)
IMAGE = -200


def test_a_row_written_out():
    labels = [7, -100, -100, 11, -100, 13]
    row = layout.row([7, 8, IMAGE, 11, 12, 13], labels, [Visual.film(4, SMALL)], SMALL)
    assert row.tokens.tolist() == [7, 8, 0, 0, 0, 0, 11, 12, 13]
    assert row.slots.tolist() == [-1, -1, 0, 1, 2, 3, -1, -1, -1]
    assert row.positions.tolist() == list(range(9))
    assert row.segments.tolist() == [1] * 9
    targets, weights = layout.targets(row)
    assert targets.tolist() == [
        0,
        11,
        11,
        11,
        11,
        11,
        0,
        13,
        0,
    ]  # the run, and what is before it, predict what follows it
    assert weights.tolist() == [0, 1, 1, 1, 1, 1, 0, 1, 0]


def test_models_that_name_every_frame():
    small = train_bpe(["Frame1: What is seen?"] * 4, 300)
    asked = [{"role": "user", "content": chat.frames_question("What?", 8)}]
    ids = chat.prompt_ids(small, asked, template="internvl2_5")
    row = layout.row(ids, None, [Visual.film(8, SMALL, parts=8)], dataclasses.replace(SMALL, max_length=400))
    runs = np.flatnonzero(np.diff((row.slots >= 0).astype(int)) == 1)
    assert len(runs) == 8  # four tokens for a clip of four frames: one each
    assert row.slots[row.slots >= 0].tolist() == list(range(8))
    assert "Frame8: <img></img>" in small.decode(row.tokens[row.slots < 0])


def test_a_film_and_a_tiled_picture_in_one_row():
    visuals = [Visual.picture(3, (2, 1)), Visual.film(8, SMALL), Visual.picture()]
    row = layout.row([5, IMAGE, 6, IMAGE, 7, IMAGE], None, visuals, SMALL)
    clips = 8
    assert row.slots[1:13].tolist() == [clips + i for i in range(12)]  # a column of tiles needs no interleaving
    assert row.slots[14:22].tolist() == list(range(8))
    assert row.slots[23:].tolist() == [clips + 12 + i for i in range(4)]
    assert (row.num_clips, row.num_tiles) == (2, 4)
    batch = layout.collate([row], SMALL, 64, 3, 5, pixels=False)
    assert batch.slots[0, 14:22].tolist() == list(range(8))
    assert batch.slots[0, 1:5].tolist() == [12, 13, 14, 15]  # tiles begin after all three clips of the batch
    assert batch.clips.shape == (1, 0, 4, 2, 2, 3)


def test_raster_order_of_joined_tiles():
    order = layout.tile_order(Visual.picture(7, (2, 3)), 4)
    canvas = np.zeros((4, 6), int)
    for tile in range(6):
        y, x = divmod(tile, 3)
        canvas[2 * y : 2 * y + 2, 2 * x : 2 * x + 2] = (4 + 4 * tile + np.arange(4)).reshape(2, 2)
    assert order.tolist() == [0, 1, 2, 3, *canvas.ravel().tolist()]


def test_a_film_over_several_placeholders():
    row = layout.row([5, IMAGE, 6, IMAGE], None, [Visual.film(8, SMALL, parts=2)], SMALL)
    assert row.slots.tolist() == [-1, 0, 1, 2, 3, -1, 4, 5, 6, 7]


def test_recorded_batch_of_the_whole_model(golden):
    """Film, tiled picture, text and two pictures: labels and lengths after the visuals are spliced in."""
    case = golden.case("F_full", "umt224_mixed_batch_train")
    stored = golden.tensors(case["file"])
    tokenizer = load_tokenizer(golden.folder / "G_tokenizer")
    geometry = Geometry(image_px=224, frames_per_clip=4, tokens_per_clip=64, tokens_per_image=64, max_length=4096)
    visuals = [
        [Visual.film(4, geometry)],
        [Visual.picture(3, (2, 1))],
        [],
        [Visual.picture(), Visual.picture()],
    ]
    rows = []
    for sample, seen in zip(case["config"]["conversations"], visuals, strict=True):
        text = chat.encode_sample(
            tokenizer, sample["conversation"], has_media=sample["has_image"], message=sample["msg"]
        )
        rows.append(layout.row(text.ids, text.labels, seen, geometry))
    batch = layout.collate(rows, geometry, pixels=False)
    assert batch.shape == stored["spliced_labels"].shape
    assert ((batch.segments > 0) == (stored["spliced_attention_mask"] > 0)).all()
    for b, row in enumerate(rows):
        expected = stored["spliced_labels"][b]
        assert row.labels.tolist() == expected[: len(row)].tolist()
        plain = np.append(expected[1:], -100)
        real = np.append(batch.slots[b, 1:], -1) < 0  # others may be the last alive before what follows the run
        assert (np.where(batch.weights[b] > 0, batch.targets[b], -100) == plain)[real].all()


def test_packing_keeps_conversations_apart():
    first = layout.row([1, IMAGE, 2], [-100, -100, 2], [Visual.film(4, SMALL)], SMALL)
    second = layout.row([3, IMAGE, IMAGE, 4], [3, -100, -100, 4], [Visual.picture(), Visual.film(4, SMALL)], SMALL)
    row = layout.pack([first, second], SMALL)
    assert row.segments.tolist() == [1] * 6 + [2] * 10
    assert row.positions.tolist() == [*range(6), *range(10)]
    assert row.slots.tolist() == [-1, 0, 1, 2, 3, -1, -1, 8, 9, 10, 11, 4, 5, 6, 7, -1]
    targets, weights = layout.targets(row)
    assert targets[5] == weights[5] == 0  # the end of one does not predict the start of the next
    assert targets[6:15].tolist() == [4] * 9  # also before the run, all of which may be dropped
    thrice = layout.pack([row, first], SMALL)
    assert thrice.segments.max() == 3
    assert thrice.slots[-5:-1].tolist() == [8, 9, 10, 11]
    assert thrice.slots[7:11].tolist() == [12, 13, 14, 15]


def test_collate_pads_on_the_right():
    clips = np.full((1, 4, 2, 2, 3), 9, np.uint8)
    film = layout.row([1, IMAGE, 2], [-100, -100, 2], [Visual.film(4, SMALL)], SMALL, clips=clips)
    text = layout.row([3, 4], [3, 4], [], SMALL)
    batch = layout.collate([film, text], SMALL, 8, 2, 1)
    assert batch.segments.tolist() == [[1] * 6 + [0, 0], [1, 1] + [0] * 6]
    assert batch.slots[1].tolist() == [-1] * 8
    assert batch.clips.shape == (2, 2, 4, 2, 2, 3)
    assert batch.clips.sum(axis=(2, 3, 4, 5)).tolist() == [[9 * 48, 0], [0, 0]]
    assert batch.images.shape == (2, 1, 2, 2, 3)
    assert batch.drop is None
    assert batch.weights[1].tolist() == [1.0] + [0.0] * 7


def test_a_schedule_brings_a_plan():
    geometry = dataclasses.replace(SMALL, drop=DropSchedule("uniform", (1,), (1.0, 0.5)))
    rows = [layout.row([1, IMAGE, 2], [-100, -100, 2], [Visual.film(4 * n, geometry)], geometry) for n in (1, 3)]
    batch = layout.collate(rows, geometry, pixels=False)
    assert batch.drop.keep[:, 0, 0].tolist() == [2, 6]
    assert batch.drop.lengths == (8,)
    sizes = [layout.measure(r, geometry) for r in rows]
    assert [s.kept for s in sizes] == [(4,), (8,)]
    wider = layout.collate(rows[:1], geometry, 20, pixels=False, sizes=sizes[1])
    assert wider.drop.lengths == (8,)  # another host's row decides


def test_the_end_is_lost_only_on_request():
    ids = [1, IMAGE, 2, 3]
    film = [Visual.film(64, SMALL)]
    with pytest.raises(ValueError, match=r"the row has 67 tokens \(64 visual, 3 text\) but the limit is 64; raise"):
        layout.row(ids, None, film, SMALL)
    cut = layout.row(ids, [1, -100, 2, 3], film, SMALL, truncate="reference")
    assert len(cut) == 64
    assert not layout.targets(cut)[1].any()
    assert len(layout.row(ids, None, film, SMALL, max_length=67)) == 67


def test_faults_are_named():
    with pytest.raises(ValueError, match="2 <image> placeholders for 1 films or pictures"):
        layout.row([IMAGE, IMAGE], None, [Visual.picture()], SMALL)
    with pytest.raises(ValueError, match="6 frames do not make whole clips of 4"):
        Visual.film(6, SMALL)
    with pytest.raises(ValueError, match="a grid of 2x2 tiles"):
        layout.row([IMAGE], None, [Visual.picture(3, (2, 2))], SMALL)
    row = layout.row([1, 2, 3], None, [], SMALL)
    with pytest.raises(ValueError, match="a row has 3 tokens but the batch has room for 2"):
        layout.collate([row], SMALL, 2)


def test_positions_may_jump():
    row = layout.row(list(range(1, 41)), None, [], SMALL)
    rng = np.random.default_rng(0)
    for _ in range(20):
        jumped = layout.skip_positions(row, 100, rng).positions - row.positions
        assert 0 <= jumped[0] <= jumped[-1] <= 100
        assert len(set(jumped.tolist())) <= 2
        assert (np.diff(jumped) >= 0).all()
    assert (layout.skip_positions(row, 0, rng).positions == row.positions).all()
