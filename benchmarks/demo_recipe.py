"""What a recipe of the demo scores: make the world, train the stages up to the long films, ask the needle grid.

`hico demo` does one recipe and much besides. This does any recipe and only that, so several fit beside each other on
one GPU: `XLA_PYTHON_CLIENT_PREALLOCATE=false python benchmarks/demo_recipe.py --out a --short 300 --short-rows 24 &`.
Without options it is the demo's own. On a CPU, what it prints is what the demo would score.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import re
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

LENGTHS, DEPTHS = (64, 256, 1024), (0.0, 0.25, 0.5, 0.75, 1.0)


def main() -> int:
    """Train and ask one recipe; its numbers go to OUT/recipe.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--world", type=pathlib.Path, help="made before, to share it between recipes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=4, help="films of each length and depth; two questions each")
    for name in ("pictures", "picture-rows", "short", "short-rows", "long", "long-rows", "long-frames"):
        parser.add_argument(f"--{name}", type=int)
    for name in ("short-lr", "long-lr"):
        parser.add_argument(f"--{name}", type=float)
    args = parser.parse_args()
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str((args.out / "compiled").resolve()))

    from data_pipeline.world import make
    from hico_jax.demo import measure, plan, training
    from hico_jax.evals import needle

    args.out.mkdir(parents=True, exist_ok=True)
    if args.world:
        (args.out / "world").symlink_to(args.world.resolve())
    else:
        make.make_world(args.out / "world", preset=plan.FULL.preset, seed=args.seed)
    steps = {"stage2": args.pictures, "stage3": args.short, "stage3_long": args.long}
    rows = {"stage2": args.picture_rows, "stage3": args.short_rows, "stage3_long": args.long_rows}
    rates = {"stage3": args.short_lr, "stage3_long": args.long_lr}
    stages = []
    for stage in plan.FULL.stages[:-1]:
        tune = stage.tune + tuple(
            f"{key}={value[stage.name]}"
            for key, value in (("data.batch_size", rows), ("optim.lr", rates))
            if value.get(stage.name)
        )
        if stage.name == "stage3_long" and args.long_frames:
            clips = args.long_frames // 4
            tune += (f"data.max_frames={args.long_frames}", *plan.shape(96 + 16 * clips, clips, 0))
        # The last of each key: a tuple that is given twice would be joined.
        tune = tuple({flag.partition("=")[0]: flag for flag in tune}.values())
        stages.append(dataclasses.replace(stage, tune=tune, steps=steps.get(stage.name) or stage.steps, kill_at=None))
    chosen = dataclasses.replace(plan.FULL, stages=tuple(stages))
    began = time.monotonic()
    trained = training.train(args.out, chosen, args.seed)
    seconds = time.monotonic() - began
    v = measure.viewer(args.out, chosen)
    trials = needle.haystack(
        v, args.out / "films", lengths=LENGTHS, depths=DEPTHS, repeats=args.repeats, seed=args.seed + 10_000
    )
    found = {
        "recipe": {k: v for k, v in vars(args).items() if v is not None and k not in ("out", "world")},
        "stages": [re.sub(r"\S+/", "", s["command"]) for s in trained["stages"]],
        "loss": {s["name"]: sum(s["loss"][-10:]) / 10 for s in trained["stages"]},
        "train_s": seconds,
        "right": {n: sum(t.correct for t in trials if t.seconds == n) for n in LENGTHS},
        "asked": {n: sum(t.seconds == n for t in trials) for n in LENGTHS},
        "total": measure.summary(trials),
    }
    (args.out / "recipe.json").write_text(json.dumps(found, indent=1, default=str) + "\n")
    print(json.dumps({k: found[k] for k in ("recipe", "loss", "train_s", "right", "asked", "total")}, default=str))
    return 0


if __name__ == "__main__":
    sys.exit(main())
