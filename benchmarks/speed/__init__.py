"""Speed on one accelerator: one row per figure of the opponent's table, each in a process of its own.

    python -m benchmarks.speed --json speed.json            # all rows, by worth, at real sizes with random weights
    python -m benchmarks.speed --rows vision_224,decode_7b  # some
    python -m benchmarks.speed --list                       # what there is, and about how long each takes
    python -m benchmarks.speed --small                      # the same programs on `nano`, in seconds, on any machine
    python -m benchmarks.speed --torch --rows ...           # also the plain PyTorch twins, where torch is installed

Needs jax, flax, optax, numpy and jaxtyping; no data, no network, nothing of what the host's side needs. A row that
fails (memory, compiler, an abort of the process) is reported with its message, and the next goes on; the JSON is
written after every row.

In: the command line. Out: a line per row as it ends, a Markdown table, JSON.
Next: benchmarks/speed/rows.py
"""
