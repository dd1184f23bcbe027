from __future__ import annotations

import numpy as np
import pytest

from data_pipeline import frames
from data_pipeline.frames import Sampling

FILE = "G_preprocess_frames.json"


def sampling(args):
    return Sampling(
        sample=args["sample"],
        min_frames=args.get("min_num_frames", 1),
        max_frames=args.get("max_num_frames", -1),
        multiple=args.get("local_num_frames", 8),
        num_wanted=args["num_frames"],
        offset=args.get("fix_start"),
    )


def test_recorded_frame_indices(golden):
    for case in golden.json(FILE)["get_frame_indices"]:
        args = case["args"]
        if "error" in case:
            with pytest.raises(ValueError, match=r"sample|frames"):
                frames.frame_indices(args["vlen"], float(args.get("input_fps", 1)), sampling(args))
        else:
            got = frames.frame_indices(args["vlen"], float(args.get("input_fps", 1)), sampling(args))
            assert got.tolist() == case["out"], case


def test_recorded_readers(golden):
    for case in golden.json(FILE)["readers"]:
        args = case["args"]
        start, end = map(float, args["clip"]) if args["clip"] else (None, None)
        if case["reader"] == "decord":
            first, count, duration = 0, case["vlen"], case["vlen"] / case["fps"]
            if start is not None:
                first, count, duration = frames.clip_window(count, case["fps"], start, end)
            got = first + frames.frame_indices(count, case["fps"], sampling(args))
        else:
            fps = 3.0 if case["is_tvqa"] else 1.0
            got, duration = frames.folder_indices(case["n_files"], fps, sampling(args), start_s=start, end_s=end)
        assert got.tolist() == case["frame_indices"], case
        assert duration == case["duration"]


def test_recorded_segment_centres(golden):
    for case in golden.json(FILE)["get_index"]:
        assert frames.segment_centres(case["num_frames"], case["num_segments"]).tolist() == case["out"]


def test_recorded_time_messages(golden):
    for case in golden.json(FILE)["time_msg"]:
        chosen = Sampling(
            case["sample_type"], case["frames_lowbound"], case["frames_upbound"], case["local_num_frames"]
        )
        indices = frames.frame_indices(case["vlen"], case["fps"], chosen)
        style = case["time_msg"] or "none"
        assert frames.time_message(case["vlen"] / case["fps"], indices, case["fps"], style) == case["msg"]


@pytest.mark.parametrize(
    ("num_frames", "fps", "low", "high", "multiple", "count", "head", "tail"),
    [
        (300, 30, 64, 512, 8, 64, [1, 6, 11, 15, 20, 25], [282, 287, 292, 297]),
        (3000, 30, 64, 512, 8, 96, [15, 46, 77, 108, 140, 171], [2890, 2921, 2952, 2983]),
        (90000, 30, 64, 512, 8, 512, [87, 262, 438, 614], [89383, 89559, 89735, 89911]),
        (50, 30, 64, 512, 8, 48, [0, 1, 2], [45, 46, 47, 48]),
        (7, 30, 64, 512, 8, 8, [0, 1, 2, 3, 4, 5, 6, 6], [6, 6]),
        (3, 30, 64, 512, 4, 4, [0, 1, 2, 2], [2]),
        (300, 30, 64, 32, 8, 64, [1], [297]),
        (107, 23.976, 64, 512, 8, 64, [0, 1, 3, 5, 6, 8], [100, 101, 103, 105]),
    ],
)
def test_published_examples(num_frames, fps, low, high, multiple, count, head, tail):
    got = frames.frame_indices(num_frames, float(fps), Sampling("dynamic_fps1", low, high, multiple)).tolist()
    assert len(got) == count
    assert got[: len(head)] == head
    assert got[-len(tail) :] == tail


def test_training_and_inference_count_differently():
    counts = [len(frames.frame_indices(2525, 25.0, Sampling(multiple=m))) for m in (4, 8)]
    assert counts == [100, 96]


def test_random_sampling_stays_in_its_intervals_and_obeys_the_seed():
    chosen = Sampling("rand", 1, 16)
    a = frames.frame_indices(320, 30.0, chosen, np.random.default_rng(0))
    b = frames.frame_indices(320, 30.0, chosen, np.random.default_rng(0))
    assert a.tolist() == b.tolist()
    assert (a // 20).tolist() == list(range(16))
    assert (a % 20 < 19).all()
    assert a.tolist() != frames.frame_indices(320, 30.0, chosen, np.random.default_rng(1)).tolist()
    short = frames.frame_indices(16, 30.0, chosen, np.random.default_rng(0))  # intervals of one frame
    assert short.tolist() == list(range(16))


def test_fixed_offset():
    assert frames.frame_indices(80, 8.0, Sampling("fix_start", 1, 4, offset=3)).tolist() == [3, 23, 43, 63]


@pytest.mark.parametrize("sample", ["bogus", "fps", "fps0", "fps-1", "fpsinf", "fpsnan"])
def test_unknown_sample_is_named(sample):
    with pytest.raises(ValueError, match=f"sample is '{sample}'"):
        Sampling(sample)


def test_an_empty_part_is_an_error():
    with pytest.raises(ValueError, match=r"from 11 s to 12 s holds no frame; the film lasts 10\.00 s"):
        frames.clip_window(300, 30.0, 11.0, 12.0)
    with pytest.raises(ValueError, match="holds no frame"):
        frames.folder_indices(10, 1.0, start_s=20.0, end_s=30.0)
    with pytest.raises(ValueError, match="it must be 'short'"):
        frames.time_message(1.0, [0], 1.0, "verbose")
