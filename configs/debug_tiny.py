r"""The whole path with the smallest model: data, steps, metrics, checkpoint. Under a minute on a laptop CPU.

Data:   hico world --out world_tiny --preset tiny
Run:    hico train --config=configs/debug_tiny.py --config.workdir=runs/tiny \
            --config.data.annotations=world_tiny/short.yaml --config.data.tokenizer=TOKENIZER
Expect: the loss falls below its start; run it again and it says that nothing is left to do.
"""

from __future__ import annotations

from configs import common


def get_config(arg: str = "tiny") -> common.ConfigDict:
    variant, _ = common.parse(arg)
    view = common.experiment(
        "debug",
        variant,
        data={},
        optim={"lr": 2e-3},
        train={"steps": 20},
        checkpoint={"every": 10, "keep": 2},
        toy={"data": {"batch_size": 8, "num_epochs": 0}, "train": {"log_every": 1}},
    )
    if variant == "tiny":
        view.model.llm.vocab_size = 512  # its own 64 rows are fewer than bytes
    return view
