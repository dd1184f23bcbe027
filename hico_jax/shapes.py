"""The house alphabet of dimensions, and the array types that carry it.

    B rows of the batch        L sequence length          S keys' length, or visual tokens of a row
    N clips of a row           I image tiles of a row     T frames of a clip
    P patches before merging   M visual tokens after      E vision width
    D language-model width     H query heads              K key/value heads
    G heads per key/value head d head width               F MLP width
    V vocabulary               height width               spelled out

Annotations read `Float[Array, "B L D"]`; they are checked in tests (jaxtyping + beartype) and free elsewhere.
"""

from jax import Array
from jaxtyping import Bool, Float, Int, Int8, UInt8, UInt32
from numpy import ndarray

__all__ = ["Array", "Bool", "Float", "Int", "Int8", "UInt8", "UInt32", "ndarray"]
