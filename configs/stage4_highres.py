r"""Stage 4: the same tower at twice the resolution. Tower and projector train, the language model is frozen.

A variant of 224 pixels means its twin of 448; the parent may have either, since position tables are constants.

Reference: a quarter of stage 3's data, one epoch, batch 256, peak rate 1e-5, two to three days on 32 A100.
Run:    hico train --config=configs/stage4_highres.py:umt_hd_qwen2_7b --config.workdir=runs/stage4 \
            --config.init.parent=runs/stage3 --config.data.annotations=stage4.yaml --config.data.tokenizer=QWEN
Laptop: hico train --config=configs/stage4_highres.py:nano --config.workdir=runs/nano4 \
            --config.init.parent=runs/nano3 --config.data.annotations=world/short.yaml --config.data.tokenizer=world
Expect: nano's loss starts above its parent's last.

After the colon: rates=applied (every part at 1e-5, as the released weights had) or rates=intended (tower 2e-6).
"""

from __future__ import annotations

from configs import common

TWINS = {"umt_qwen2_7b": "umt_hd_qwen2_7b", "nano": "nano_hd", "hico_nano": "hico_nano_hd"}


def get_config(arg: str = "umt_hd_qwen2_7b") -> common.ConfigDict:
    variant, options = common.parse(arg, rates="applied")
    return common.experiment(
        "stage4",
        TWINS.get(variant, variant),
        data={
            "batch_size": 256,
            "min_frames": 64,
            "max_frames": 512,
            "worker_count": 4,
        },
        optim={
            "lr": 1e-5,
            "rates": ((r"llm/.*", None), *common.rates(options["rates"])),
            "accumulate": 8,
            "loss_average": "example",
        },
        train={"steps": None},
        checkpoint={"every": 500, "keep": 2},
        toy={
            "data": {"position_skip": 8192},
            "optim": {"lr": 1e-3},
            "train": {"steps": 100},
            "checkpoint": {"every": 100},
        },
    )
