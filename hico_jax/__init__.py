"""VideoChat-Flash in JAX: hierarchical compression for long-context video models.

Importing the package costs nothing: no JAX, no Flax. Start with `hico --help`, or read `models/hico.py`.
"""

__version__ = "0.1.0"
