"""How a row's tokens are dealt to the devices that share it: chunk i and chunk 2n-1-i to device i.

A token late in a causal row sees more keys than an early one. Cut into 2n chunks and paired from both ends, every
device has the same work. The host deals once; from then on positions, targets and everything else travel with the
tokens.

In: a `Batch` with NumPy leaves, in row order. Out: the same batch, padded and dealt (`batch.ring` says so).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from hico_jax.shapes import Int, ndarray

# What padding holds, where it is not 0.
FILL = {"slots": -1, "survives": 127}
OF_TOKENS = ("tokens", "slots", "positions", "segments", "targets", "weights")


def order(length: int, ring: int) -> Int[ndarray, " L"]:
    """Which token of the row sits in each place, device after device.

    Raises:
      ValueError: the length is not a multiple of twice the ring.

    Example:
      >>> order(8, 2).tolist()
      [0, 1, 6, 7, 2, 3, 4, 5]
    """
    if length % (2 * ring):
        raise ValueError(
            f"a row of {length} tokens cannot be dealt to {ring} devices in two equal chunks each; make its length a "
            f"multiple of {2 * ring}, for example {length + -length % (2 * ring)} (data.length_step)"
        )
    if ring == 1:
        return np.arange(length)
    chunks = np.arange(length).reshape(2 * ring, -1)
    return np.stack([chunks[:ring], chunks[: ring - 1 : -1]], 1).reshape(-1)


def deal(batch: Any, ring: int, *, multiple: int = 1) -> Any:
    """Pad a batch's rows to two chunks of a multiple of `multiple` tokens for each of `ring` devices, and deal them.

    Nothing is done twice. Pixels stay as they are: clips are shared out in their own order.

    Raises:
      ValueError: the batch is dealt already, for another ring.
    """
    if batch.ring == ring:
        return batch
    if batch.ring != 1:
        raise ValueError(f"the batch is dealt to {batch.ring} devices but mesh.sequence is {ring}; deal it anew")
    step = 2 * ring * multiple
    length = batch.tokens.shape[1]
    places = order(length + -length % step, ring)

    def one(name: str, array: Any) -> Any:
        padded = np.pad(np.asarray(array), ((0, 0), (0, -length % step)), constant_values=FILL.get(name, 0))
        return padded[:, places]

    new = {name: one(name, getattr(batch, name)) for name in OF_TOKENS}
    if batch.drop is not None:
        plan = batch.drop
        new["drop"] = dataclasses.replace(
            plan,
            survives=one("survives", plan.survives),
            labelled=one("labelled", plan.labelled),
            lengths=tuple(n + -n % step for n in plan.lengths),
        )
    return dataclasses.replace(batch, **new, ring=ring)
