"""How closely float64 numbers of two implementations agree, and how closely they must."""

from collections.abc import Mapping
from typing import Any

import numpy as np

TOLERANCE = 1e-13  # of an array's largest value; 4e-15 in values and 2e-14 in gradients were seen


def error(ours: Any, theirs: np.ndarray) -> float:
    """The largest difference, relative to the largest value; to 1e-6 where that is less."""
    return np.max(np.abs(np.asarray(ours) - theirs)) / max(np.max(np.abs(theirs)), 1e-6)


def assert_close(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], tolerance: float = TOLERANCE
) -> None:
    """All of `theirs` by name, arrays of NumPy, JAX or PyTorch without gradient."""
    assert theirs
    errors = {}
    for name, b in theirs.items():
        a, b = np.asarray(ours[name]), np.asarray(b)
        assert a.shape == b.shape, name
        errors[name] = error(a, b)
    assert not {name: e for name, e in errors.items() if not e <= tolerance}


def assert_gradients_close(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Gradients by the parameters' names in PyTorch.

    Seven are zero in theory, as a BatchNorm removes what these biases add, and hold rounding noise.
    """
    last = max(int(name.split(".")[3]) for name in theirs if name.startswith("layers.3.blocks."))
    noise = [f"layers.{i}.downsample.proj.0.bias" for i in range(3)] + ["proj.bias"]
    for module in ("attn.stoken_refine.proj", "mlp2.conv.conv", "mlp2.fc2"):
        noise.append(f"layers.3.blocks.{last}.{module}.bias")
    assert max(np.max(np.abs(np.asarray(theirs[name]))) for name in noise) < 1e-15
    assert_close(ours, {name: theirs[name] for name in noise}, 1e-9)
    assert_close(ours, {name: theirs[name] for name in theirs.keys() - noise})
