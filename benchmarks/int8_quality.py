"""What 8-bit weights cost: logits and answers of a model with and without `quantize="int8"`, on any machine.

    python benchmarks/int8_quality.py --model nano              # the world's questions about films it never saw
    python benchmarks/int8_quality.py --model FOLDER --films 20
    python benchmarks/int8_quality.py                           # random weights, text only: the arithmetic alone

Prints the logits' error behind each prompt beside their spread, how often the likeliest token stays the likeliest, how
many answers are word for word the same, and the score of both against the truth.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import tempfile
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from flax import nnx  # noqa: E402

from hico_jax import api, generate, quantize, registry  # noqa: E402
from hico_jax.evals.compress import world  # noqa: E402
from hico_jax.generate import GenerationConfig  # noqa: E402
from hico_jax.models.llm.decoder import Stream  # noqa: E402


def main(argv: list[str] | None = None) -> int:
    """Print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder, or a name that `hico ask --model` takes")
    parser.add_argument("--variant", default="hico_nano", help="whose random weights, without --model (%(default)s)")
    parser.add_argument("--films", type=int, default=8, help="of each kind (%(default)s)")
    parser.add_argument("--seconds", type=int, default=64, help="of the long ones (%(default)s)")
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args(argv)
    found = asked(args) if args.model else arithmetic(args.variant)
    print("\n".join(f"{name:26} {value:.4g}" for name, value in found.items() if isinstance(value, int | float)))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def asked(args: argparse.Namespace) -> dict[str, Any]:
    """Both models on the made-up world."""
    exact, packed = api.load(args.model, "float32"), api.load(args.model, "float32", quantize="int8")
    settings = GenerationConfig(max_new_tokens=16, eos=exact.tokenizer.eos_ids)
    lines: list[tuple[np.ndarray, np.ndarray, str, str, str]] = []
    with tempfile.TemporaryDirectory() as folder:
        items = world.items(pathlib.Path(folder), args.films, args.seconds, 20_000)
        watched: dict[str, Any] = {}
        for item in items:
            if item.video not in watched:
                watched = {item.video: exact.watch(item.video)}  # the tower is the same in both
            film = watched[item.video]
            logits = [_logits(m, film, item.prompt) for m in (exact, packed)]
            said = [m.viewer.ask(film, item.prompt, config=settings).text for m in (exact, packed)]
            lines.append((*logits, *said, item.expected))
    score = lambda which: np.mean([line[which].strip().rstrip(".").lower() == line[4].lower() for line in lines])
    return {
        "questions": len(lines), **compared(np.stack([li[0] for li in lines]), np.stack([li[1] for li in lines])),
        "same_answers": float(np.mean([li[2] == li[3] for li in lines])),
        "right": float(score(2)), "right_int8": float(score(3)),
    }  # fmt: skip


def _logits(model: Any, film: Any, question: str) -> np.ndarray:
    """Behind the prompt."""
    viewer, hico = model.viewer, model.hico
    batch, visual = viewer.prompt([viewer.row(film, question, ())], [film])
    stream = generate.spliced(hico, batch, visual)
    logits, _ = generate.begin(hico.llm, stream, batch.drop, schedule=hico.config.drop, room=1)
    return np.asarray(logits[0])


def arithmetic(variant: str) -> dict[str, Any]:
    """Random weights and text: no more than what rounding does to sums."""
    config = registry.model_config(variant).llm
    llm = config.build(rngs=nnx.Rngs(params=0))
    ids = jax.random.randint(jax.random.key(1), (8, 128), 0, config.vocab_size, jnp.int32)

    @jax.jit
    def run(llm: Any) -> Any:
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32), ids.shape)
        ones = jnp.ones_like(ids)
        stream = Stream(x=llm.embed(ids), positions=positions, segments=ones, slots=-ones)
        return generate.logits_of(llm, llm(stream, None)[0].x)

    exact = np.asarray(run(llm)).reshape(-1, config.vocab_size)
    return compared(exact, np.asarray(run(quantize.quantized(llm))).reshape(-1, config.vocab_size))


def compared(exact: np.ndarray, packed: np.ndarray) -> dict[str, float]:
    """Errors of logits, and of what they say."""
    log = lambda x: np.asarray(jax.nn.log_softmax(x, axis=-1))
    divergence = (np.exp(log(exact)) * (log(exact) - log(packed))).sum(-1)
    return {
        "logits_spread": float(exact.std()), "logits_error_rms": float(np.sqrt(np.square(exact - packed).mean())),
        "logits_error_max": float(np.abs(exact - packed).max()), "divergence_nats": float(divergence.mean()),
        "same_first_token": float((exact.argmax(-1) == packed.argmax(-1)).mean()),
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
