r"""Fine-tune a released model on your own videos with low-rank adapters; everything else stays as it is.

Data:   a folder of videos and a films.jsonl beside them, one conversation a line:
          {"video": "a.mp4", "conversations": [{"from": "human", "value": "<image>\\nWhat happens?"},
                                               {"from": "gpt", "value": "A ball falls."}]}
Check:  hico data check films.jsonl
Run:    hico train --config=configs/finetune_lora.py:umt_qwen2_7b --config.workdir=runs/mine \
            --config.data.annotations=films.jsonl --config.data.tokenizer=WEIGHTS --config.init.weights="('WEIGHTS',)"
Ask:    hico ask a.mp4 "What happens?" --model runs/mine     (adapters are merged as it loads)
Laptop: the same with :nano, --config.init.parent=runs/nano3 instead of weights, and --config.data.tokenizer=world

PEFT:   hico export runs/mine out/adapter --part adapter

After the colon: base=int8 holds the adapted weights in 8 bits (QLoRA); parts=llm, or all (tower and projector too).
"""

from __future__ import annotations

from configs import common

PARTS = {
    "llm": (r"llm/blocks/(attn/w[qkvo]|mlp/(gate|up|down))",),
    "all": (
        r"llm/blocks/(attn/w[qkvo]|mlp/(gate|up|down))", r"projector/.*w",
        r"vision/blocks/(attn/(wqkv|wo)|(up|down)/w)",
    ),
}  # fmt: skip


def get_config(arg: str = "umt_qwen2_7b") -> common.ConfigDict:
    variant, options = common.parse(arg, base="full", parts="llm", rank=16)
    if options["parts"] not in PARTS:
        raise ValueError(f"option parts is {options['parts']!r}; it must be one of {', '.join(PARTS)}")
    view = common.experiment(
        "lora",
        variant,
        data={"batch_size": 16, "min_frames": 16, "max_frames": 64, "num_epochs": 3, "worker_count": 4},
        optim={"lr": 1e-4, "rates": ((r"lora/.*", "lr"),), "accumulate": 4},
        train={"steps": None},
        checkpoint={"every": 200, "keep": 2},
        toy={
            "data": {"batch_size": 8, "min_frames": 4},
            "optim": {"lr": 2e-3},
            "train": {"steps": 40},
            "checkpoint": {"every": 20},
        },
    )
    view.lora.rank, view.lora.base, view.lora.targets = options["rank"], options["base"], PARTS[options["parts"]]
    view.lora.alpha = 2.0 * options["rank"]
    return view
