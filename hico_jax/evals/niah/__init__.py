"""Needles in a haystack of frames: the paper's single-hop and multi-hop tests, and the honest forms of them.

`needles.py` what is hidden, `haystack.py` where, encoded once, `probe.py` the question, `grid.py` all of them,
`command.py` is `hico niah`. The demo's own test, whole films with a card each, is `hico_jax/evals/needle.py`.
"""
