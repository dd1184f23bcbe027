r"""Stage 2: visual pre-training. Everything trains; images and short films of up to 8 frames.

Reference: 3.5 M images and 2.5 M short films, one epoch, batch 256, peak rate 1e-5, two days on 32 A100.
Run:    hico train --config=configs/stage2_pretrain.py:umt_qwen2_7b --config.workdir=runs/stage2 \
            --config.init.parent=runs/stage1 --config.data.annotations=stage2.yaml --config.data.tokenizer=QWEN
Laptop: hico train --config=configs/stage2_pretrain.py:nano --config.workdir=runs/nano2 \
            --config.init.parent=runs/nano1 --config.data.annotations=world/images.yaml --config.data.tokenizer=world
Expect: with world/images.yaml nano's loss is below 0.1 after its 120 steps, half a minute on two cores.

After the colon: rates=applied (every part at 1e-5, as the released weights had) or rates=intended (tower 2e-6).
"""

from __future__ import annotations

from configs import common


def get_config(arg: str = "umt_qwen2_7b") -> common.ConfigDict:
    variant, options = common.parse(arg, rates="applied")
    return common.experiment(
        "stage2",
        variant,
        data={
            "batch_size": 256,
            "min_frames": 4,
            "max_frames": 8,
            "worker_count": 8,
        },
        optim={
            "lr": 1e-5,
            "rates": common.rates(options["rates"]),
            "accumulate": 8,
            "loss_average": "example",
        },
        train={"steps": None},
        checkpoint={"every": 1000, "keep": 2},
        toy={
            "optim": {"lr": 1e-3},
            "train": {"steps": 120},
            "checkpoint": {"every": 100},
        },
    )
