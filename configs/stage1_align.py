r"""Stage 1: align the projector. Images and clips of 4 frames with captions; tower and language model frozen.

Reference: 1.04 M samples, one epoch, batch 512, peak rate 1e-3, under an hour on 32 A100.
Run:    hico train --config=configs/stage1_align.py:umt_qwen2_7b --config.workdir=runs/stage1 \
            --config.data.annotations=stage1.yaml --config.data.tokenizer=QWEN \
            --config.init.weights="('QWEN', 'UMT')"
Laptop: hico train --config=configs/stage1_align.py:nano --config.workdir=runs/nano1 \
            --config.data.annotations=world/stage1.yaml --config.data.tokenizer=world
Expect: nano's loss falls a little only, because the frozen parts are random; it shows the path, not the effect.
"""

from __future__ import annotations

from configs import common


def get_config(arg: str = "umt_qwen2_7b") -> common.ConfigDict:
    variant, _ = common.parse(arg)
    return common.experiment(
        "stage1",
        variant,
        data={
            "batch_size": 512,
            "template": "plain",
            "sample": "middle",
            "min_frames": 4,
            "max_frames": 4,
            "image_aspect": "square",
            "max_length": 8192,
            "group_by_modality_length": False,
            "worker_count": 16,
        },
        optim={
            "lr": 1e-3,
            "rates": ((r"projector/.*", "lr"), (r".*", None)),
            "accumulate": 4,
            "loss_average": "micro_batch",
        },
        train={"steps": None},
        checkpoint={"every": 500, "keep": 2},
        toy={
            "data": {"max_frames": 4, "max_length": 0},
            "optim": {"lr": 2e-3},
            "train": {"steps": 20},
            "checkpoint": {"every": 100},
        },
    )
