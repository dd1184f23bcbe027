"""Pure functions on arrays: no Flax, no config, no mesh names.

Every attention kernel shares one signature: `f(q, k, v, *, q_positions, k_positions, q_segments, k_segments, causal)`
with `q: [B L H d]`, `k, v: [B S K d]`. A query sees a key of its own non-zero segment, at its own position or
earlier when `causal`. No kernel but `reference.py` builds an L x S array.
"""
