"""What a checkpoint says of itself: of every leaf its form and digest, and a checksum over that.

The digests are taken from the live arrays on the devices before a save, so that they also catch
what goes wrong on the way to the disk.
"""

import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from stvit_jax.errors import UserError
from stvit_jax.trees import leaves

PyTree = Any

_FORMAT = 1
_BITS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}  # by bytes per element


class DamagedError(Exception):
    """The checkpoint on disk is not what was saved."""


def _mix_a(x: jax.Array) -> jax.Array:
    """lowbias32: a bijection of uint32 in which every input bit moves every output bit."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def _mix_b(x: jax.Array) -> jax.Array:
    """MurmurHash3's finaliser: another such bijection."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _add(xs: tuple[jax.Array, ...], ys: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    return tuple(x + y for x, y in zip(xs, ys, strict=True))


@jax.jit
def _hash_leaf(leaf: jax.Array) -> jax.Array:
    """uint32 (3,): two hashes of the bit pattern, and the number of non-finite elements.

    Compiled once per shape, dtype and sharding: one program for all leaves would take XLA minutes.
    """
    if leaf.dtype == jnp.bool_:
        words = [leaf.astype(jnp.uint32)]
    elif leaf.dtype.itemsize == 8:
        halves = lax.bitcast_convert_type(leaf, jnp.uint32)  # (..., 2)
        words = [halves[..., 0], halves[..., 1]]
    else:
        words = [lax.bitcast_convert_type(leaf, _BITS[leaf.dtype.itemsize]).astype(jnp.uint32)]
    # The position in the whole array, whatever part of it a device holds. No reshape: flattening a
    # sharded array would gather it.
    position = jnp.zeros(leaf.shape, jnp.uint32)
    for axis, size in enumerate(leaf.shape):
        position = position * jnp.uint32(size) + lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
    first, second = _mix_b(position), _mix_a(position)
    for word in words:
        first, second = _mix_a(first ^ word), _mix_b(second + word)
    inexact = jnp.issubdtype(leaf.dtype, jnp.inexact)
    non_finite = ~jnp.isfinite(leaf) if inexact else jnp.zeros(leaf.shape, jnp.bool_)
    terms = (first, second, non_finite.astype(jnp.uint32))
    # Sums modulo 2^32 do not depend on the order, hence not on the sharding. One reduction over
    # all three: as three, XLA compiles them three times as long, and on CPU they run slower by ten.
    return jnp.stack(lax.reduce(terms, (jnp.uint32(0),) * 3, _add, tuple(range(leaf.ndim))))


def _one_copy(leaf: jax.Array) -> jax.Array:
    """Of a replicated array one device's copy: every device would hash the same."""
    return leaf.addressable_data(0) if leaf.is_fully_replicated else leaf


def leaf_digests(state: PyTree) -> tuple[dict[str, str], list[str]]:
    """Digests of the bit patterns of all leaves, computed on the devices that hold them.

    A digest is two 32-bit hashes. A change within one 32-bit word of a leaf (one element, or half
    of a 64-bit one) always alters it: every term is a bijection of its word. Any other change,
    permutations included, is missed with a chance of about 2^-64. It does not depend on the
    sharding or the number of devices.

    Args:
      state: a pytree of `jax.Array`s: floats of any width, integers, bool, scalars and empty
          arrays among them. No complex numbers, no typed PRNG keys.

    Returns:
      digests: path of the leaf (`params/stem/kernel`) to 16 hexadecimal digits.
      non_finite: paths of the leaves that hold a NaN or an infinity, sorted.
    """
    hashes = jax.device_get({path: _hash_leaf(_one_copy(x)) for path, x in leaves(state).items()})
    digests = {path: f"{int(a):08x}{int(b):08x}" for path, (a, b, _) in hashes.items()}
    return digests, [path for path, (_, _, non_finite) in hashes.items() if non_finite]


def forms(tree: PyTree) -> dict[str, str]:
    """Of every leaf its dtype and shape, as `float32(64, 10)`."""
    return {path: f"{leaf.dtype}{tuple(leaf.shape)}" for path, leaf in leaves(tree).items()}


def describe(
    position: int, state: PyTree, digests: dict[str, str], notes: dict[str, Any]
) -> dict[str, Any]:
    """The JSON item of the checkpoint of `state` at `position`, with the run's own notes."""
    meta = {"format": _FORMAT, "position": position, "forms": forms(state), "digests": digests}
    meta |= {"notes": notes}
    return meta | {"checksum": _checksum(meta)}


def check(meta: dict[str, Any], position: int) -> None:
    """Checks the JSON item that was found at `position`.

    Raises:
      UserError: another version of the program wrote it.
      DamagedError: it is not as it was written, or belongs to another position.
    """
    body = {key: value for key, value in meta.items() if key != "checksum"}
    if meta.get("checksum") != _checksum(body):
        raise DamagedError("its JSON item does not agree with its checksum")
    if meta["format"] != _FORMAT:
        raise UserError(
            f"checkpoint {position} has format {meta['format']}, this program reads {_FORMAT}; "
            "use the version of the program that wrote it"
        )
    if meta["position"] != position:
        raise DamagedError(f"it holds the state of batch {meta['position']}")


def _checksum(meta: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()
