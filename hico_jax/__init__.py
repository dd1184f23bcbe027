"""VideoChat-Flash in JAX: hierarchical compression for long-context video models.

Importing the package costs nothing: no JAX, no Flax. Start with `hico --help`, with `hico_jax.load` (`api.py`), or
read `models/hico.py`. Many questions about one film: `serve/session.py`.
"""

from typing import Any

__version__ = "0.1.0"

__all__ = ["__version__", "load"]


def load(folder: Any, dtype: Any = None, **options: Any) -> Any:
    """Read a model from a folder of released, exported or trained weights: an `api.Model` (see `api.load`)."""
    from hico_jax import api

    return api.load(folder, dtype, **options)
