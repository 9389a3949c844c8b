"""Digests: equal to a slow loop's, and different for everything that may happen to bits."""

import jax.numpy as jnp
import numpy as np
import pytest

from stvit_jax.checkpoints.digests import leaf_digests
from tests.checkpoints.states import arrays, on_devices, slow_digest

DTYPES = ["float32", "bfloat16", "float16", "int32", "uint32", "int8", "uint8", "bool"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0, 4), (7,), (3, 4, 5)])
def test_digest_is_that_of_the_slow_loop(dtype: str, shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).normal(scale=50, size=shape).astype(jnp.dtype(dtype))
    digests, non_finite = leaf_digests({"leaf": jnp.asarray(array)})
    assert digests == {"leaf": slow_digest(array)} and non_finite == []


def test_digest_sees_every_flipped_bit_and_every_swap() -> None:
    bits = np.arange(24, dtype=np.uint32) << 22  # few bits set, as in small and round numbers

    def digest(array: np.ndarray) -> str:
        return leaf_digests({"leaf": jnp.asarray(array.view(np.float32))})[0]["leaf"]

    seen = {digest(bits)}
    for element in range(bits.size):
        for bit in range(32):
            changed = bits.copy()
            changed[element] ^= np.uint32(1 << bit)
            seen.add(digest(changed))
    assert len(seen) == 1 + 32 * bits.size
    for one in range(bits.size):
        for other in range(one):
            changed = bits.copy()
            changed[[one, other]] = changed[[other, one]]
            seen.add(digest(changed))
    assert len(seen) == 1 + 32 * bits.size + bits.size * (bits.size - 1) // 2


def test_digest_names_leaves_that_are_not_finite() -> None:
    state = arrays(0)
    state.params["stem"]["bias"][3] = np.nan
    state.moments[0].mean[7, 31] = -np.inf
    assert leaf_digests(on_devices(state))[1] == ["moments/0/mean", "params/stem/bias"]
