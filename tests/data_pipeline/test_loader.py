from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import yaml
from PIL import Image

from data_pipeline import loader as loaders
from data_pipeline.loader import make_loader
from data_pipeline.options import DataConfig
from data_pipeline.tokenizer import train_bpe
from hico_jax.batch import DropSchedule, Geometry

GEOMETRY = Geometry(image_px=8, frames_per_clip=4, tokens_per_clip=4, tokens_per_image=4, max_length=512)


@pytest.fixture(scope="module")
def small():
    return train_bpe(["What is seen? The video lasts for seconds, and frames are uniformly sampled from it."] * 4, 330)


@pytest.fixture(scope="module")
def data(film_kit, tmp_path_factory):
    """Twelve films of different lengths, six pictures, eight texts."""
    folder = tmp_path_factory.mktemp("data")
    films, pictures, texts = [], [], []
    for i in range(12):
        film_kit.write(folder / f"f{i}.mp4", 8 + 10 * i, options={"preset": "ultrafast"})
        films.append({"id": f"f{i}", "video": f"f{i}.mp4", "conversations": talk("<image>\nWhat?", "ball " * (i + 1))})
    for i in range(6):
        Image.new("RGB", (8 * (i + 1), 8), (40 * i, 0, 0)).save(folder / f"p{i}.png")
        pictures.append({"id": f"p{i}", "image": f"p{i}.png", "conversations": talk("<image>\nWhat?", "square")})
    for i in range(8):
        texts.append({"id": f"t{i}", "conversations": talk("Say something.", "word " * (3 * i + 1))})
    for name, items in (("films", films), ("pictures", pictures), ("texts", texts)):
        (folder / f"{name}.json").write_text(json.dumps(items))
    entries = [{"json_path": f"{n}.json", "data_root": "."} for n in ("films", "pictures", "texts")]
    (folder / "all.yaml").write_text(yaml.safe_dump({"datasets": entries}))
    return folder


def talk(question, answer):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def config(data, **changed):
    base = DataConfig(
        annotations=str(data / "all.yaml"), batch_size=4, min_frames=4, max_frames=16, read_threads=2, prefetch_rows=4
    )
    return dataclasses.replace(base, **changed)


def leaves(batch):
    arrays = [batch.tokens, batch.slots, batch.positions, batch.segments, batch.targets, batch.weights]
    arrays += [batch.clips, batch.images]
    return arrays + ([batch.drop.survives, batch.drop.keep, batch.drop.labelled] if batch.drop else [])


def same(a, b):
    return all(x.shape == y.shape and (x == y).all() for x, y in zip(leaves(a), leaves(b), strict=True))


def test_an_epoch(data, small):
    made = list(make_loader(config(data), GEOMETRY, small))
    assert len(made) == 6  # four batches of media, two of text; two media samples sit out
    ids = [i for m in made for i in m.info.ids]
    assert len(ids) == len(set(ids)) == 24
    for batch, info in made:
        kinds = {i[0] == "t" for i in info.ids}
        assert len(kinds) == 1  # all text or all media
        assert batch.shape[0] == 4
        assert batch.shape[1] % 128 == 0
        assert (batch.clips.shape[1] == 0) == all(i[0] != "f" for i in info.ids)
        assert not info.bad
        assert 0 < info.waste < 1
        assert (batch.weights.sum(1) > 0).all()
    assert made[3].ids == made[3].info.ids
    assert [m.info.step for m in made] == list(range(6))


def test_the_same_seed_gives_the_same_batches(data, small):
    first = list(make_loader(config(data), GEOMETRY, small))
    again = list(make_loader(config(data, read_threads=1, prefetch_rows=1), GEOMETRY, small))
    assert all(same(a.batch, b.batch) and a.ids == b.ids for a, b in zip(first, again, strict=True))
    other = list(make_loader(config(data, seed=1), GEOMETRY, small))
    assert [m.ids for m in other] != [m.ids for m in first]


def test_a_restored_loader_gives_the_next_batch(data, small):
    made = config(data, num_epochs=2, sample="rand")
    whole = list(make_loader(made, GEOMETRY, small))
    assert len(whole) == 12
    assert whole[0].ids != whole[6].ids
    for stop in (0, 3, 7):
        part = make_loader(made, GEOMETRY, small)
        for _ in range(stop):
            next(part)
        state = json.loads(json.dumps(part.get_state()))
        part.close()
        rest = list(make_loader(made, GEOMETRY, small, start=state))
        assert [r.info.step for r in rest] == list(range(stop, 12))
        assert all(same(a.batch, b.batch) and a.info == b.info for a, b in zip(rest, whole[stop:], strict=True))


@pytest.mark.slow
def test_processes_give_what_threads_give(data, small):
    threads = list(make_loader(config(data), GEOMETRY, small))
    made = config(data, worker_count=2)
    processes = list(make_loader(made, GEOMETRY, small))
    assert all(same(a.batch, b.batch) and a.info == b.info for a, b in zip(threads, processes, strict=True))
    part = make_loader(made, GEOMETRY, small)
    next(part)
    state = json.loads(json.dumps(part.get_state()))
    part.close()
    rest = list(make_loader(made, GEOMETRY, small, start=state))
    assert all(same(a.batch, b.batch) for a, b in zip(threads[1:], rest, strict=True))


def test_a_position_serves_another_number_of_hosts(data, small):
    whole = list(make_loader(config(data), GEOMETRY, small))
    part = make_loader(config(data), GEOMETRY, small)
    next(part)
    state = part.get_state()
    hosts = [
        list(make_loader(config(data), GEOMETRY, small, process_index=p, process_count=4, start=state))
        for p in range(4)
    ]
    for step, parts in enumerate(zip(*hosts, strict=True), 1):
        assert {i for made in parts for i in made.ids} == set(whole[step].ids)
    part.set_state(state)
    assert same(next(part).batch, whole[1].batch)


def test_a_position_of_other_data_is_refused(data, small):
    state = make_loader(config(data), GEOMETRY, small).get_state()
    with pytest.raises(ValueError, match="belongs to other annotations"):
        make_loader(config(data, seed=7), GEOMETRY, small, start=state)


@pytest.mark.parametrize("drop", [DropSchedule(), DropSchedule("uniform0_attention", (1, 2), (1.0, 0.5, 0.25))])
def test_hosts_share_the_rows_and_agree_on_shapes(data, small, drop):
    geometry = dataclasses.replace(GEOMETRY, drop=drop)
    alone = list(make_loader(config(data), geometry, small))
    hosts = [list(make_loader(config(data), geometry, small, process_index=p, process_count=2)) for p in (0, 1)]
    for whole, (one, two) in zip(alone, zip(*hosts, strict=True), strict=True):
        assert set(whole.ids) == set(one.ids) | set(two.ids)
        assert len(one.ids) == len(two.ids) == 2
        for a, b, c in zip(leaves(whole.batch), leaves(one.batch), leaves(two.batch), strict=True):
            assert a.shape[1:] == b.shape[1:] == c.shape[1:]
        rows = {i: r for part in (one, two) for i, r in zip(part.ids, part.batch.tokens, strict=True)}
        assert all((rows[i] == r).all() for i, r in zip(whole.ids, whole.batch.tokens, strict=True))
        if drop.num_stages:
            assert whole.batch.drop.lengths == one.batch.drop.lengths == two.batch.drop.lengths
            assert whole.batch.drop.num_queries == one.batch.drop.num_queries == two.batch.drop.num_queries


def test_fixed_buckets_give_one_shape(data, small):
    made = config(data, length_buckets=(256,), clip_buckets=(4,), tile_buckets=(8,), group_by_modality_length=False)
    shapes = {tuple(a.shape for a in leaves(m.batch)) for m in make_loader(made, GEOMETRY, small)}
    assert len(shapes) == 1
    with pytest.raises(ValueError, match=r"fits none of the buckets \(64,\)"):
        next(make_loader(config(data, length_buckets=(64,)), GEOMETRY, small))


def test_a_finer_step_wastes_less(data, small):
    coarse, fine = (
        [m.info.waste for m in make_loader(config(data, length_step=step), GEOMETRY, small)] for step in (128, 16)
    )
    assert np.mean(fine) < 0.5 * np.mean(coarse)


@pytest.fixture
def faulty(data, film_kit, tmp_path):
    """Sixteen films, two of them unusable in different ways."""
    items = []
    for i in range(16):
        film_kit.write(tmp_path / f"v{i}.mp4", 8, options={"preset": "ultrafast"})
        items.append({"id": f"v{i}", "video": f"v{i}.mp4", "conversations": talk("<image>\nWhat?", "ball")})
    (tmp_path / "v3.mp4").unlink()
    (tmp_path / "v5.mp4").write_bytes(b"ffconcat version 1.0\nfile 'v0.mp4'\n")
    (tmp_path / "all.json").write_text(json.dumps(items))
    return tmp_path / "all.json"


def test_bad_samples_become_masked_rows_with_a_name(faulty, data, small):
    made = list(make_loader(config(data, annotations=str(faulty), max_bad_fraction=0.2), GEOMETRY, small))
    assert sorted(i for m in made for i in m.ids) == sorted(f"v{i}" for i in range(16))
    told = [b for m in made for b in m.info.bad]
    assert len(told) == 2
    assert any(t.startswith("v3 (all.json): ") and t.endswith("v3.mp4: no such file") for t in told)
    assert any(t.startswith("v5 (all.json): ") and "playlist" in t for t in told)
    assert made[-1].info.bad_total == {"all.json": 2}
    for batch, info in made:
        bad = [any(b.startswith(f"{i} ") for b in info.bad) for i in info.ids]
        assert ((batch.weights.sum(1) == 0) == bad).all()
        assert (batch.segments.sum(1) > 0).all()  # a masked row still takes part


def test_too_many_bad_samples_stop_the_run(faulty, data, small):
    made = make_loader(config(data, annotations=str(faulty), max_bad_fraction=0.1), GEOMETRY, small)
    with pytest.raises(loaders.TooManyBadSamplesError, match=r"2 of \d+ samples .*max_bad_fraction \(0\.1\) of 16"):
        list(made)
    with pytest.raises(loaders.TooManyBadSamplesError, match=r"1 of \d+ samples"):
        list(make_loader(config(data, annotations=str(faulty), max_bad_fraction=0.0), GEOMETRY, small))


def test_a_film_that_breaks_while_it_is_read(data, film_kit, tmp_path, small, monkeypatch):
    """Hosts have counted with its size by then, so the shape stays."""

    def fail(*_):
        raise ValueError("v: broken")

    whole = [leaves(m.batch) for m in make_loader(config(data, max_bad_fraction=1.0), GEOMETRY, small)]
    monkeypatch.setattr(loaders, "read_pixels", fail)
    hurt = list(make_loader(config(data, max_bad_fraction=1.0), GEOMETRY, small))
    assert all(len(m.info.bad) == 4 for m in hurt)
    for a, b in zip(whole, hurt, strict=True):
        assert [x.shape for x in a] == [x.shape for x in leaves(b.batch)]


def test_the_cache_saves_reading_twice(data, small, monkeypatch):
    reads = []
    plain = loaders.read_pixels
    monkeypatch.setattr(loaders, "read_pixels", lambda *a: reads.append(1) or plain(*a))
    made = config(data, num_epochs=3, cache_mb=64, read_threads=1)  # two threads may both miss the same sample
    cached = list(make_loader(made, GEOMETRY, small))
    assert len(reads) <= 26
    fresh = list(make_loader(dataclasses.replace(made, cache_mb=0), GEOMETRY, small))
    assert len(reads) > 26 + 48
    assert all(same(a.batch, b.batch) for a, b in zip(cached, fresh, strict=True))


def test_the_cache_is_bounded():
    row = loaders.layout.row([1] * 100_000, None, [], dataclasses.replace(GEOMETRY, max_length=1 << 20))
    cache = loaders.Cache(1_000_000)
    for i in range(5):  # 400 kB each
        cache.put(i, row)
    assert [cache.get(i) is not None for i in range(5)] == [False, False, False, True, True]
    assert loaders.Cache(0).get(0) is None


def test_evicting_decoded_media_changes_no_batch(data, small):
    """Room for about three films: most are decoded again in every epoch."""
    made = config(data, num_epochs=3, cache_mb=64)
    whole = make_loader(made, GEOMETRY, small)
    tight = make_loader(made, GEOMETRY, small)
    tight.plan._cache = loaders.Cache(8_000)
    assert all(same(a.batch, b.batch) and a.info == b.info for a, b in zip(whole, tight, strict=True))
    assert 0 < len(tight.plan._cache._rows) < len(whole.plan._cache._rows)


def test_annotations_that_are_none_are_holes_in_their_place(data, small, tmp_path):
    items = [{"id": f"t{i}", "conversations": talk("Say something.", "word")} for i in range(8)]
    sound = tmp_path / "sound.json"
    sound.write_text(json.dumps(items))
    hurt = tmp_path / "hurt.json"
    hurt.write_text(json.dumps([*items[:3], {"id": "t3"}, *items[4:]]))
    plain = {"max_bad_fraction": 0.5, "group_by_modality_length": False}  # groups go by length, and a hole has none
    whole, holes = (
        list(make_loader(config(data, annotations=str(f), **plain), GEOMETRY, small)) for f in (sound, hurt)
    )
    assert [m.ids for m in whole] == [m.ids for m in holes]
    assert [m.info.order for m in whole] == [m.info.order for m in holes]
    for a, b in zip(whole, holes, strict=True):
        for i, name in enumerate(a.ids):
            assert (b.batch.weights[i].sum() == 0) == (name == "t3")
            if name != "t3":
                assert (a.batch.tokens[i] == b.batch.tokens[i]).all()
    assert holes[-1].info.bad_total == {"hurt.json": 1}
    with pytest.raises(loaders.TooManyBadSamplesError, match=r"1 of 8 annotations .* the first is t3 \(hurt\.json\)"):
        make_loader(config(data, annotations=str(hurt)), GEOMETRY, small)


def test_every_host_tells_the_same_order(data, small):
    told = {
        hosts: [[m.info.order for m in make_loader(config(data), GEOMETRY, small, process_index=i, process_count=hosts)]
                for i in range(hosts)]
        for hosts in (1, 2, 4)
    }  # fmt: skip
    assert len(set(told[1][0])) == 6
    assert all(order == told[1][0] for orders in told.values() for order in orders)


def test_without_end(data, small):
    made = make_loader(config(data, num_epochs=0, annotations=str(data / "texts.json")), GEOMETRY, small)
    seen = [next(made).info.epoch for _ in range(7)]
    made.close()
    assert seen == [0, 0, 1, 1, 2, 2, 3]
    assert made.num_steps is None


def test_faults_before_the_first_batch(data, small, tmp_path):
    with pytest.raises(ValueError, match=r"data\.annotations is empty"):
        make_loader(DataConfig(), GEOMETRY, small)
    with pytest.raises(ValueError, match="is 4 for 3 hosts"):
        make_loader(config(data), GEOMETRY, small, process_count=3)
    with pytest.raises(ValueError, match="neither tokenizer"):
        make_loader(config(data, tokenizer=str(tmp_path)), GEOMETRY)


def test_the_tokenizer_may_be_a_folder(data, small, tmp_path):
    small.save(tmp_path)
    named = next(make_loader(config(data, tokenizer=str(tmp_path)), GEOMETRY))
    given = next(make_loader(config(data), GEOMETRY, small))
    assert same(named.batch, given.batch)
    assert np.isfinite(named.info.waste)


def test_the_end_is_a_position_too(data, small):
    made = make_loader(config(data), GEOMETRY, small)
    assert len(list(made)) == made.num_steps == 6
    assert next(made, None) is None
    assert list(make_loader(config(data), GEOMETRY, small, start=made.get_state())) == []


def test_packed_rows_hold_whole_conversations(data, small, tmp_path):
    kept = {"pack": 260, "index_file": str(tmp_path / "index.npz"), "max_bad_fraction": 1.0, "length_step": 16}
    plain = {}
    for made in make_loader(config(data, batch_size=1, group_by_modality_length=False), GEOMETRY, small):
        b = made.batch
        plain[made.info.ids[0]] = [a[0][b.segments[0] > 0] for a in (b.tokens, b.targets, b.weights, b.positions)]
    loads = list(make_loader(config(data, **kept), GEOMETRY, small))
    again = list(make_loader(config(data, **kept), GEOMETRY, small))  # from the kept lengths
    hosts = [make_loader(config(data, **kept), GEOMETRY, small, process_index=i, process_count=2) for i in range(2)]
    assert sum(m.info.waste for m in loads) / len(loads) < 0.4
    for one, two, left, right in zip(loads, again, *hosts, strict=True):
        assert same(one.batch, two.batch)
        assert (np.sort(left.batch.tokens, 0) == np.sort(one.batch.tokens[0::2], 0)).all()
        assert left.batch.tokens.shape == right.batch.tokens.shape
        segments = [(r, s) for r in range(4) for s in range(1, one.batch.segments[r].max() + 1)]
        for name, (r, s) in zip(one.info.ids, segments, strict=True):
            mine, b = one.batch.segments[r] == s, one.batch
            for whole, packed in zip(plain[name], (b.tokens, b.targets, b.weights, b.positions), strict=True):
                assert (packed[r][mine] == whole).all()
    assert max(int(m.batch.segments.max()) for m in loads) > 2


def test_a_long_row_may_show_fewer_frames_instead(data, small):
    def texts(**changed):
        return {
            i: m.batch
            for m in make_loader(
                config(data, annotations=str(data / "films.json"), batch_size=1, min_frames=16, **changed),
                GEOMETRY, small,
            )
            for i in m.info.ids
        }  # fmt: skip

    whole = texts()
    limit = 8 + max(int(((b.segments > 0) & (b.slots < 0)).sum()) for b in whole.values())
    cut = texts(max_length=limit, truncate="frames")
    assert {i for i, b in whole.items() if b.segments.sum() > limit}
    for name, batch in cut.items():
        assert batch.segments.sum() <= limit
        assert batch.weights.sum() > 2, name
        learnt = [b.targets[0][(b.weights[0] > 0) & (b.slots[0] < 0)].tolist() for b in (batch, whole[name])]
        assert learnt[0][-4:] == learnt[1][-4:]


def test_a_weight_of_zero_leaves_a_dataset_out(data, small):
    entries = [
        {"json_path": "films.json", "data_root": ".", "weight": 0},
        {"json_path": "texts.json", "data_root": ".", "weight": 0.5},
    ]
    (data / "weights.yaml").write_text(yaml.safe_dump({"datasets": entries}))
    made = list(make_loader(config(data, annotations=str(data / "weights.yaml"), num_epochs=2), GEOMETRY, small))
    assert sorted(i for m in made for i in m.info.ids) == [f"t{i}" for i in range(8)]


def test_conversations_that_cannot_be_learnt_from_are_holes(data, small, tmp_path):
    """No answer, an answer with nothing in it, more marks than files: masked, counted and named, all else as it was."""
    picture = {"image": str(data / "p1.png")}
    items = [{"id": f"ok{i}", **picture, "conversations": talk("<image>\nWhat?", "square")} for i in range(5)]
    hurt = {
        "silent": {"conversations": talk("<image>\nWhat?", "")[:1]},
        "empty": {"conversations": talk("<image>\nWhat?", " ")},
        "marks": {"conversations": talk("<image> and <image>\nWhat?", "square")},
    }
    items[2:2] = [{"id": name, **picture, **item} for name, item in hurt.items()]
    (tmp_path / "talks.json").write_text(json.dumps(items))
    made = config(data, annotations=str(tmp_path / "talks.json"), max_bad_fraction=0.5)
    found = list(make_loader(made, GEOMETRY, small))
    told = {b.split(" ")[0]: b for m in found for b in m.info.bad}
    assert set(told) == set(hurt)
    assert found[-1].info.bad_total == {"talks.json": 3}
    for batch, info in found:
        for name, learnt in zip(info.ids, batch.weights.sum(1) > 0, strict=True):
            assert learnt == name.startswith("ok")


def test_a_missing_annotation_file_inside_a_yaml_stops_before_the_first_batch(data, small):
    entries = [{"json_path": "texts.json"}, {"json_path": "gone.json"}]
    (data / "gone.yaml").write_text(yaml.safe_dump({"datasets": entries}))
    with pytest.raises(ValueError, match=r"gone\.json: no such annotation file"):
        make_loader(config(data, annotations=str(data / "gone.yaml")), GEOMETRY, small)
