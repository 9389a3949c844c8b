"""Checkpoints that are saved beside the training, verified on restore, and survive damage.

One Orbax Composite per checkpoint under `DIRECTORY/POSITION/`: `state` (any pytree of arrays) and
`meta` (JSON: the position; of every leaf dtype, shape and digest; a checksum over all of it).
Position is the number of batches consumed. The digests are taken from the live arrays on the
devices before the save, so they also catch what goes wrong on the way to the disk.

Where this departs from Orbax's own behaviour, and why:

- Orbax restores a checkpoint with a flipped bit without a word, and its `latest_step()` may name
  one that is damaged or was never committed. Here a restore counts only when every digest agrees;
  a damaged checkpoint is named, set aside and never deleted, and the one before is tried.
- A failed asynchronous save surfaces in Orbax on some later call, as an error. Here every save is
  awaited and looked up on disk before the next; single failures are logged, three in a row end.
- Orbax logs dozens of lines per save. They are dropped while a `Checkpoints` is open: whatever
  goes wrong reaches the caller as an exception and is reported here, in one line.
"""

import contextlib
import hashlib
import json
import logging as standard_logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax import lax
from jax.experimental import multihost_utils

from stvit_jax.errors import UserError, listing, one_line
from stvit_jax.trees import leaves

PyTree = Any

_FORMAT = 1
_FAILURES_IN_A_ROW = 3
_ORBAX = str(Path(ocp.__file__).parent)
_BITS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}  # by bytes per element


class _DamagedError(Exception):
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


class Checkpoints:
    """The checkpoints of one run, at most `keep` of them, newest first on restore.

    For one thread; with several processes every method is called by all of them. While it is
    open, Orbax's own log lines are dropped.
    """

    def __init__(self, directory: str | Path, *, keep: int) -> None:
        """Opens (or creates) `directory` and removes what killed saves left behind.

        Raises:
            UserError: the directory cannot be created or read.
        """
        self._directory = epath.Path(directory).absolute()  # Orbax takes no relative path
        self._keep = keep
        self._in_flight: int | None = None  # position of the save that is not yet checked
        self._failures = 0
        logging.get_absl_logger().addFilter(self._is_not_from_orbax)
        try:
            self._manager = self._open()
        except OSError as error:
            logging.get_absl_logger().removeFilter(self._is_not_from_orbax)
            raise UserError(
                f"checkpoints cannot be kept in {self._directory}: {one_line(error)}; "
                "make it a directory that can be written, or use another workdir"
            ) from error

    def save(self, position: int, state: PyTree) -> None:
        """Saves in the background; returns as soon as `state` may be donated or changed.

        Waits for the save before, so that at most one is in flight. A position that is already
        saved is left as it is. A save that fails is logged and survived.

        Args:
            position: batches consumed.
            state: a pytree of `jax.Array`s, as `leaf_digests` takes them.

        Raises:
            UserError: the state holds non-finite values (nothing is saved then and the older
                checkpoints stay), or three saves in a row have failed.
        """
        self.wait()
        self._remove_leftovers()
        if position in self._manager.all_steps():
            return
        digests, non_finite = leaf_digests(state)
        if non_finite:
            raise UserError(
                f"after batch {position} the state holds non-finite values in "
                f"{listing(non_finite, 3)}; it was not saved, and the checkpoints in "
                f"{self._directory} are from before; lower learning_rate or look at the data, then "
                "start again"
            )
        try:
            self._manager.save(
                position,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(state),
                    meta=ocp.args.JsonSave(_meta(position, state, digests)),
                ),
                force=True,
            )
        except Exception as error:  # OSError, ValueError, RuntimeError: whatever the writers meet
            self._failed(position, error)
        else:
            self._in_flight = position

    def wait(self) -> int | None:
        """Waits for the save in flight, if any; returns the newest position that is on disk.

        Raises:
            UserError: the save failed, and so did the two before.
        """
        if self._in_flight is not None:
            position, self._in_flight = self._in_flight, None
            try:
                self._manager.wait_until_finished()
                self._manager.reload()
                if position not in self._manager.all_steps():
                    raise OSError("it was not committed")
            except Exception as error:
                self._failed(position, error)
            else:
                self._failures = 0
        return max(self._manager.all_steps(), default=None)

    def restore_newest(self, abstract_state: PyTree) -> tuple[int, PyTree] | None:
        """Restores the newest checkpoint that verifies.

        Each damaged one is named in one line. Once a sound one is found, the damaged ones are moved
        to the sibling directory `DIRECTORY-damaged`, so that their positions can be saved again.

        Args:
            abstract_state: the state as `jax.ShapeDtypeStruct`s with shardings, which may be of
                another device count than the saved ones.

        Returns:
            The position and the state, every bit as saved; None where there is no checkpoint.

        Raises:
            UserError: the newest sound checkpoint is of another network, or none is sound.
                Then nothing has been moved, and the next call says the same.
            ValueError: a leaf of `abstract_state` has no sharding.
        """
        if missing := [path for path, x in leaves(abstract_state).items() if x.sharding is None]:
            raise ValueError(f"abstract_state has no sharding at {listing(missing, 3)}")
        self.wait()
        damaged: list[int] = []
        for position in sorted(self._manager.all_steps(), reverse=True):
            try:
                state = self._restore(position, abstract_state)
            except UserError:
                raise
            except Exception as error:  # the readers raise anything on damaged files
                path = self._directory / str(position)
                logging.warning("checkpoint %s is damaged: %s", path, one_line(error))
                damaged.append(position)
            else:
                self._set_aside(damaged)
                return position, state
        if damaged:
            # Starting over is for the user to decide: the files may still be worth something.
            raise UserError(
                f"no checkpoint in {self._directory} is sound; bring back a copy, or remove that "
                "directory to start from the beginning"
            )
        return None

    def close(self) -> None:
        """Waits for the save in flight and releases everything.

        Raises:
            UserError: as `wait`.
        """
        try:
            self.wait()
        finally:
            self._manager.close()
            logging.get_absl_logger().removeFilter(self._is_not_from_orbax)

    def _open(self) -> ocp.CheckpointManager:
        self._remove_leftovers()
        # Orbax removes old ones only after the new one is committed.
        policy = ocp.checkpoint_managers.LatestN(n=self._keep)
        options = ocp.CheckpointManagerOptions(preservation_policy=policy)
        # One copy of a replicated array is written as it is. Orbax would have every device write a
        # slice of it, and compile a program for every slice: half a minute at the first save.
        registry = ocp.type_handlers.create_type_handler_registry(
            (jax.Array, ocp.type_handlers.ArrayHandler(use_replica_parallel=False))
        )
        handlers = {
            "state": ocp.PyTreeCheckpointHandler(type_handler_registry=registry),
            "meta": ocp.JsonCheckpointHandler(),
        }
        return ocp.CheckpointManager(self._directory, options=options, item_handlers=handlers)

    def _remove_leftovers(self) -> None:
        """What killed and failed saves wrote; nothing may be in flight."""
        if jax.process_index() == 0:
            for path in self._directory.glob("*.orbax-checkpoint-tmp*"):
                # The threads of a save that failed a moment ago may still be writing there. Orbax's
                # own clean-up fails the next save then; this one removes the rest before it.
                with contextlib.suppress(OSError):
                    path.rmtree()

    def _failed(self, position: int, error: Exception) -> None:
        self._failures += 1
        # A new manager starts clean and counts as old checkpoints only what is on disk. Where even
        # that fails, the next save does, and tries again.
        with contextlib.suppress(Exception):
            self._manager.close()
        with contextlib.suppress(OSError):
            self._manager = self._open()
        if self._failures == _FAILURES_IN_A_ROW:
            raise UserError(
                f"{_FAILURES_IN_A_ROW} saves in a row failed in {self._directory}, the last at "
                f"batch {position}: {one_line(error)}; free some space there, then start again"
            ) from error
        logging.warning(
            "checkpoint of batch %d was not saved: %s; going on, with the ones before in place",
            position,
            one_line(error),
        )

    def _restore(self, position: int, abstract_state: PyTree) -> PyTree:
        """Raises UserError where it does not fit, anything else where it is damaged."""
        meta = self._manager.restore(
            position, args=ocp.args.Composite(meta=ocp.args.JsonRestore())
        ).meta
        _check_meta(meta, position)
        if differing := _differences(meta["forms"], _forms(abstract_state)):
            raise UserError(
                f"checkpoint {self._directory / str(position)} is of another network or optimiser: "
                f"{listing(differing, 3)}; use the config it was made with, or another workdir"
            )
        restore_args = ocp.checkpoint_utils.construct_restore_args(abstract_state)
        state = self._manager.restore(
            position,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeRestore(abstract_state, restore_args=restore_args)
            ),
        ).state
        digests, _ = leaf_digests(state)
        if wrong := [path for path in digests if digests[path] != meta["digests"][path]]:
            raise _DamagedError(
                f"the digest of {listing(wrong, 3)} is not the one it was saved with"
            )
        return state

    def _set_aside(self, positions: list[int]) -> None:
        if not positions:
            return
        # Beside, not inside: whoever lists DIRECTORY finds checkpoints only.
        aside = self._directory.parent / f"{self._directory.name}-damaged"
        if jax.process_index() == 0:
            aside.mkdir(parents=True, exist_ok=True)
            for position in positions:
                target, copies = aside / str(position), 0
                while target.exists():
                    copies += 1
                    target = aside / f"{position}.{copies}"
                (self._directory / str(position)).rename(target)
        multihost_utils.sync_global_devices("stvit_jax.checkpoints: damaged ones set aside")
        self._manager.reload()
        logging.warning("damaged checkpoints were moved to %s", aside)

    def _is_not_from_orbax(self, record: standard_logging.LogRecord) -> bool:
        return not record.pathname.startswith(_ORBAX)


def _forms(tree: PyTree) -> dict[str, str]:
    """Of every leaf its dtype and shape, as `float32(64, 10)`."""
    return {path: f"{leaf.dtype}{tuple(leaf.shape)}" for path, leaf in leaves(tree).items()}


def _meta(position: int, state: PyTree, digests: dict[str, str]) -> dict[str, Any]:
    meta = {"format": _FORMAT, "position": position, "forms": _forms(state), "digests": digests}
    return meta | {"checksum": _checksum(meta)}


def _checksum(meta: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _check_meta(meta: dict[str, Any], position: int) -> None:
    body = {key: value for key, value in meta.items() if key != "checksum"}
    if meta.get("checksum") != _checksum(body):
        raise _DamagedError("its JSON item does not agree with its checksum")
    if meta["format"] != _FORMAT:
        raise UserError(
            f"checkpoint {position} has format {meta['format']}, this program reads {_FORMAT}; "
            "use the version of the program that wrote it"
        )
    if meta["position"] != position:
        raise _DamagedError(f"it holds the state of batch {meta['position']}")


def _differences(saved: dict[str, str], wanted: dict[str, str]) -> list[str]:
    """What a user needs to hear about leaves that are missing, unknown or of another form."""
    return [
        f"{path} is {saved.get(path, 'absent')} there and {wanted.get(path, 'absent')} here"
        for path in wanted | saved
        if saved.get(path) != wanted.get(path)
    ]
