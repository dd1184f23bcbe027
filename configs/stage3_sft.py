r"""Stage 3: instruction tuning on short and long films together, 64 to 512 frames. Everything trains.

Reference: about 4.0 M samples, one epoch, batch 256, peak rate 1e-5; 15,784 steps and 45 hours on 128 GPUs for
the 2B model, whose loss was 1.33 at step 1, 0.75 at step 101 and 0.57 over the last twentieth.
Run:    hico train --config=configs/stage3_sft.py:umt_qwen2_7b --config.workdir=runs/stage3 \
            --config.init.parent=runs/stage2 --config.data.annotations=stage3.yaml --config.data.tokenizer=QWEN
Laptop: hico train --config=configs/stage3_sft.py:nano --config.workdir=runs/nano3 \
            --config.init.parent=runs/nano2 --config.data.annotations=world/short.yaml --config.data.tokenizer=world
Expect: nano's loss is near 0.06 after its 300 steps, three minutes on two cores.

After the colon: rates=applied (every part at 1e-5, as the released weights had) or rates=intended (tower 2e-6).
"""

from __future__ import annotations

from configs import common


def get_config(arg: str = "umt_qwen2_7b") -> common.ConfigDict:
    variant, options = common.parse(arg, rates="applied")
    return common.experiment(
        "stage3",
        variant,
        data={
            "batch_size": 256,
            "min_frames": 64,
            "max_frames": 512,
            "worker_count": 6,
        },
        optim={
            "lr": 1e-5,
            "rates": common.rates(options["rates"]),
            "accumulate": 8,
            "loss_average": "example",
        },
        train={"steps": None},
        checkpoint={"every": 500, "keep": 2},
        toy={
            "data": {"position_skip": 8192},
            "optim": {"lr": 1e-3},
            "train": {"steps": 300},
            "checkpoint": {"every": 50},
        },
    )
