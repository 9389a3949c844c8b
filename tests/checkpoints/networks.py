"""Networks whose weights the tests put into files."""

import jax
import numpy as np

from stvit_jax import torch_weights

FORMS = {"pth": "w.pth", "safetensors": "w.safetensors", "directory": "w"}


def tree_of(state_dict: dict[str, np.ndarray], dtype=np.float32) -> dict:
    """Variables with the golden values, floats in `dtype`."""
    return torch_weights.from_torch(
        {k: x.astype(dtype) if x.ndim else x for k, x in state_dict.items()}
    )


def assert_bits_equal(ours, theirs) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
