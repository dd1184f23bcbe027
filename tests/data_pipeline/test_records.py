from __future__ import annotations

import contextlib
import json
import os
import pathlib
import pickle
import subprocess
import sys
import tempfile
import warnings

import numpy as np
import pytest
from PIL import Image

from data_pipeline import prepare, records, stills
from data_pipeline.annotations import Sample, read_annotations
from data_pipeline.loader import make_loader
from data_pipeline.options import DataConfig
from data_pipeline.tokenizer import train_bpe
from hico_jax.batch import Geometry

ROOT = pathlib.Path(__file__).resolve().parents[2]
GEOMETRY = Geometry(image_px=8, frames_per_clip=4, tokens_per_clip=4, tokens_per_image=4, max_length=512)


def talk(question):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": "A ball."}]


@pytest.fixture(scope="module")
def both(film_kit, tmp_path_factory):
    """Annotations of films (shared by two conversations, cut by seconds, missing), a folder of frames and text."""
    folder = tmp_path_factory.mktemp("routes")
    for i in range(3):
        film_kit.write(folder / f"f{i}.mp4", 20 + 10 * i, options={"preset": "ultrafast"})
    (folder / "frames").mkdir()
    for i in range(8):
        Image.new("RGB", (8, 8), (30 * i, 0, 0)).save(folder / "frames" / f"{i:03}.png")
    items = [{"id": f"v{i}", "video": f"f{i % 3}.mp4", "conversations": talk("<image>\nWhat?")} for i in range(5)]
    items[1] |= {"start": 0.2, "end": 0.9}
    items += [
        {"id": "gone", "video": "gone.mp4", "conversations": talk("<image>\nWhat?")},
        {"id": "frames", "video": "frames", "video_read_type": "img", "conversations": talk("<image>\nWhat?")},
        {"id": "text", "conversations": talk("Say.")},
    ]
    (folder / "a.json").write_text(json.dumps(items))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepare.prepare(read_annotations(folder / "a.json"), folder / "made")
    return folder


def test_both_routes_end_in_the_same_examples(both):
    tokenizer = train_bpe(["What is seen? The video lasts for seconds."] * 4, 320)
    batches = []
    for route in ("a.json", "made"):
        config = DataConfig(
            annotations=str(both / route), batch_size=2, min_frames=4, max_frames=8, max_bad_fraction=1.0,
            group_by_modality_length=False, read_threads=2, prefetch_rows=4,
        )  # fmt: skip
        batches.append(list(make_loader(config, GEOMETRY, tokenizer)))
    assert len(batches[0]) == 4
    for a, b in zip(*batches, strict=True):
        assert a.info.ids == b.info.ids
        assert len(a.info.bad) == len(b.info.bad)
        for name in ("tokens", "slots", "targets", "weights", "clips"):
            assert np.array_equal(getattr(a.batch, name), getattr(b.batch, name)), name
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize(("folder", "fps"), [("TVQA/frames_hq/a", 3.0), ("tvqa_a", 3.0), ("other/a", 1.0)])
def test_a_folder_keeps_its_frame_rate(tmp_path, folder, fps):
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / folder / "0.png").touch()
    path = str(tmp_path / folder)
    _, (placed,) = prepare.plan_media([Sample("a", "s", "video", (path,), ())])
    assert stills.folder_fps(placed.paths[0]) == stills.folder_fps(path) == fps


def test_every_file_is_held_once(both):
    folder = records.find(both / "made")
    samples = records.read_samples(folder)
    assert [s.id for s in samples] == [s.id for s in read_annotations(both / "a.json")]
    assert samples[0].paths == samples[3].paths
    assert records.find(both) is None


def test_media_may_be_sent_to_a_worker_and_are_bounded(both, tmp_path, monkeypatch):
    folder = records.find(both / "made")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    media = pickle.loads(pickle.dumps(records.Media(folder, limit_mb=0)))
    one, two, three = records.read_samples(folder)[:3]
    with contextlib.ExitStack() as other:
        (first,) = media.local(one, other).paths
        with contextlib.ExitStack() as held:
            (second,) = media.local(two, held).paths
            assert media.local(two, held).paths == (second,)
        with contextlib.ExitStack() as held:
            (third,) = media.local(three, held).paths
            assert [os.path.exists(p) for p in (first, second, third)] == [True, False, True]  # the first is held
    with contextlib.ExitStack() as held, pytest.raises(ValueError, match=r"gone\.mp4: was missing"):
        media.local(records.read_samples(folder)[5], held)


def test_a_folder_of_frames_is_evicted_too(both, tmp_path, monkeypatch):
    folder = records.find(both / "made")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    media = records.Media(folder, limit_mb=0)
    for sample in (records.read_samples(folder)[6], records.read_samples(folder)[0]):
        with contextlib.ExitStack() as held:
            (path,) = media.local(sample, held).paths
    assert [p.name for p in media.cache.iterdir()] == [os.path.basename(path)]


def test_evicting_media_changes_no_batch(both, tmp_path, monkeypatch):
    """No room at all, and eight readers that evict each other's films while they are used."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    tokenizer = train_bpe(["What is seen? The video lasts for seconds."] * 4, 320)
    config = DataConfig(
        annotations=str(both / "made"), batch_size=2, min_frames=4, max_frames=8, max_bad_fraction=1.0,
        group_by_modality_length=False, read_threads=8, prefetch_rows=16, num_epochs=6,
    )  # fmt: skip
    told = []
    for limit_mb in (1024, 0):
        loader = make_loader(config, GEOMETRY, tokenizer)
        loader.plan.media = records.Media(loader.plan.media.folder, limit_mb)
        told.append([(m.info.bad, m.info.order, m.batch.tokens.tobytes(), m.batch.clips.tobytes()) for m in loader])
        loader.close()
    assert told[0] == told[1]
    assert len(told[0]) == 24


def test_a_folder_that_holds_something_is_left_alone(both):
    with pytest.raises(ValueError, match="is not empty"):
        prepare.prepare([], both)


BEAM = """
import sys
import tensorflow_datasets as tfds
from apache_beam.options.pipeline_options import PipelineOptions
from data_pipeline import prepare
from data_pipeline.annotations import read_annotations
options = PipelineOptions(["--runner=DirectRunner", "--direct_num_workers=2"])
several = tfds.download.DownloadConfig(beam_options=options, num_shards=3)
prepare.prepare(read_annotations(sys.argv[1]), sys.argv[2], beam=several)
"""


@pytest.mark.slow
def test_apache_beam_writes_the_same_records(both):
    """Apache Beam has an environment of its own: HICO_BEAM_PYTHON is a Python with it and with our requirements."""
    python = os.environ.get("HICO_BEAM_PYTHON")
    if python is None:
        pytest.skip("HICO_BEAM_PYTHON names no Python with apache-beam")
    subprocess.run([python, "-c", BEAM, str(both / "a.json"), str(both / "beam")], check=True, cwd=ROOT)
    one, many = records.find(both / "made"), records.find(both / "beam")
    assert len(list(pathlib.Path(many).glob("hico-media.array_record-*"))) == 3
    assert records.read_samples(many) == records.read_samples(one)
    for split in ("samples", "media"):
        ours, theirs = records._source(one, split), records._source(many, split)
        assert [theirs[i] for i in range(len(theirs))] == [ours[i] for i in range(len(ours))], split
