"""The model under lmms-eval: registered by an entry point, run in hico_jax's own environment.

lmms-eval needs PyTorch and an older PyAV than hico_jax, so the two live in environments of their own: `model.py` is
imported by lmms-eval and needs nothing of ours, and starts `worker.py` with the Python of hico_jax.
"""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """What lmms-eval asks an entry point of the group `lmms_eval.models` for."""
    from lmms_eval.models.registry_v2 import ModelManifest  # pyright: ignore[reportMissingImports]

    return ModelManifest(
        model_id="hico_jax", simple_class_path="hico_jax.evals.lmms.model.HicoJax", aliases=("videochat_flash_jax",)
    )
