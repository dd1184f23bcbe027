from __future__ import annotations

import dataclasses

import pytest

from data_pipeline.options import DataConfig


def test_the_defaults_hold_together():
    config = DataConfig()
    assert config.sampling().multiple == 4
    assert hash(config) == hash(DataConfig())


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        ({"batch_size": 0}, r"data\.batch_size is 0; it must be at least 1"),
        ({"template": "llama"}, r"data\.template is 'llama'; it must be one of qwen_2, plain"),
        ({"sample": "fast"}, "sample is 'fast'"),
        ({"sample": "middle", "max_frames": 0}, "needs a number of frames"),
        ({"max_frames": 30}, r"data\.max_frames is 30; give a multiple"),
        ({"frame_multiple": 0}, "frame multiple is 0"),
        ({"image_aspect": "wide"}, r"data\.image_aspect is 'wide'"),
        ({"image_grid": "six"}, "names no grid"),
        ({"time_message": "loud"}, r"data\.time_message is 'loud'"),
        ({"resize": "nearest"}, r"data\.resize is 'nearest'; it must be one of exact, fast"),
        ({"truncate": "yes"}, r"data\.truncate is 'yes'"),
        ({"length_buckets": (512, 256)}, r"data\.length_buckets is \(512, 256\); it must rise"),
        ({"clip_buckets": (-1, 4)}, r"data\.clip_buckets"),
        ({"max_bad_fraction": 1.5}, r"data\.max_bad_fraction is 1\.5"),
        ({"worker_count": -1}, r"data\.worker_count is -1"),
        ({"num_epochs": -1}, r"data\.num_epochs is -1"),
    ],
)
def test_what_is_out_of_range_is_named(changed, fault):
    with pytest.raises(ValueError, match=fault):
        dataclasses.replace(DataConfig(), **changed)
