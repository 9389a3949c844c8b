"""Checkpoints that are saved beside the training, verified on restore, and survive damage.

One Orbax Composite per checkpoint under `DIRECTORY/POSITION/`: `state` (any pytree of arrays) and
`meta` (JSON: the position; of every leaf dtype, shape and digest; a checksum over all of it, see
`digests`). Position is the number of batches consumed.

Where this departs from Orbax's own behaviour, and why:

- Orbax restores a checkpoint with a flipped bit without a word, and its `latest_step()` may name
  one that is damaged or was never committed. Here a restore counts only when every digest agrees;
  a damaged checkpoint is named, set aside and never deleted, and the one before is tried.
- A failed asynchronous save surfaces in Orbax on some later call, as an error. Here every save is
  awaited and looked up on disk before the next; single failures are said, three in a row end.
"""

import contextlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from stvit_jax import cluster, places
from stvit_jax.checkpoints import orbax
from stvit_jax.checkpoints.digests import describe, forms, leaf_digests
from stvit_jax.checkpoints.reader import numbered, positions, read_newest
from stvit_jax.console import warn
from stvit_jax.errors import UserError, listing, reason
from stvit_jax.trees import leaves

PyTree = Any

_FAILURES_IN_A_ROW = 3
_MOST_LISTED = 100  # checkpoints; older ones do not matter to what follows


class Checkpoints:
    """The checkpoints of one run, at most `keep` of them, newest first on restore.

    For one thread; with several processes every method is called by all of them, and the first,
    which has all of the replicated state, writes. While it is open, Orbax's own log lines are
    dropped.
    """

    def __init__(self, directory: str | Path, *, keep: int) -> None:
        """Opens (or creates) `directory` and removes what killed saves left behind.

        Raises:
          UserError: the directory cannot be created, read or written.
        """
        self._directory = places.of(directory)  # Orbax takes no relative path
        self._keep = keep
        self._spared: list[int] = []  # Orbax looks at it at every save
        self._in_flight: int | None = None  # position of the save that is not yet checked
        self._failures = 0
        self._manager: ocp.CheckpointManager | None = None  # where it is written
        with contextlib.ExitStack() as stack:
            stack.enter_context(orbax.quiet())
            with cluster.together():
                self._begin()
            self._quiet = stack.pop_all()

    def spare(self, position: int | None) -> None:
        """Keeps the checkpoint of this position however old it becomes; and no other one."""
        self._spared[:] = [] if position is None else [position]

    def save(self, position: int, state: PyTree, notes: dict[str, Any] | None = None) -> None:
        """Saves in the background; returns as soon as `state` may be donated or changed.

        Waits for the save before, so that at most one is in flight. A position that is already
        saved is left as it is. A save that fails is said and survived.

        Args:
          position: batches consumed.
          state: a pytree of `jax.Array`s, as `leaf_digests` takes them.
          notes: plain values that go with it.

        Raises:
          UserError: the state holds non-finite values (nothing is saved then and the older
            checkpoints stay), or three saves in a row have failed.
        """
        newest = self.wait()
        if position in self._on_disk():
            return
        digests, non_finite = leaf_digests(state)
        if non_finite:
            before = "there is none from before" if newest is None else f"the newest is {newest}"
            raise UserError(
                f"after batch {position} the state holds non-finite values in "
                f"{listing(non_finite, 3)}; it was not saved. Of the checkpoints in "
                f"{self._directory} {before}; lower learning_rate or look at the data, then start "
                "again"
            )
        meta = describe(position, state, digests, notes or {})
        if fault := self._attempt(lambda manager: self._write(manager, position, state, meta)):
            self._failed(position, fault)
        else:
            self._in_flight = position

    def save_and_wait(self, position: int, state: PyTree, notes: dict[str, Any]) -> None:
        """As `save`, and returns when it is on disk.

        Raises:
          UserError: it could not be saved.
        """
        self.save(position, state, notes)
        if self.wait() != position:
            raise UserError(
                f"step {position} could not be saved, see above; free some space, and the same "
                "command continues from the checkpoint before"
            )

    def wait(self) -> int | None:
        """Waits for the save in flight, if any; returns the newest position that is on disk.

        Raises:
          UserError: the save failed, and so did the two before.
        """
        if self._in_flight is not None:
            position, self._in_flight = self._in_flight, None
            fault = self._attempt(ocp.CheckpointManager.wait_until_finished)
            if not fault and position not in self._on_disk():
                fault = "it was not committed"
            if fault:
                self._failed(position, fault)
            else:
                self._failures = 0
        return max(self._on_disk(), default=None)

    def restore_newest(self, abstract_state: PyTree) -> tuple[int, PyTree, dict[str, Any]] | None:
        """Restores the newest checkpoint that verifies.

        Each damaged one is named in one line. Once a sound one is found, the damaged ones are moved
        to the sibling directory `DIRECTORY-damaged`, so that their positions can be saved again.

        Args:
          abstract_state: the state as `jax.ShapeDtypeStruct`s with shardings, which may be of
            another device count than the saved ones.

        Returns:
          The position, the state, every bit as saved, and its notes; None where there is no
          checkpoint.

        Raises:
          UserError: the newest sound checkpoint is of another network, or none is sound (nothing
            has been moved then, and the next call says the same); or the files cannot be read or
            moved.
          ValueError: a leaf of `abstract_state` has no sharding.
        """
        if missing := [path for path, x in leaves(abstract_state).items() if x.sharding is None]:
            raise ValueError(f"abstract_state has no sharding at {listing(missing, 3)}")
        self.wait()

        def select(path: Path, saved: dict[str, str]) -> PyTree:
            if differing := _differences(saved, forms(abstract_state)):
                raise UserError(
                    f"checkpoint {path} is of another network or optimiser: "
                    f"{listing(differing, 3)}; use the config it was made with, or another workdir"
                )
            return abstract_state

        found = read_newest(self._directory, select)
        if found is None:
            return None
        if found.damaged:
            self._set_aside(found.damaged)
        return found.position, found.state, found.notes

    def close(self) -> None:
        """Waits for the save in flight and releases everything.

        Raises:
          UserError: as `wait`.
        """
        try:
            self.wait()
        finally:
            if self._manager:
                self._manager.close()
            if self._failures:  # its threads may still have much to say
                orbax.stay_quiet()
            self._quiet.close()

    def _begin(self) -> None:
        if not cluster.is_first():
            return
        try:
            if not places.in_bucket(self._directory):
                self._directory.mkdir(parents=True, exist_ok=True)
                self._probe()
            self._manager = self._open()
        except OSError as error:
            raise UserError(
                f"checkpoints cannot be kept in {self._directory}: {reason(error)}; "
                "make it a directory that can be written, or use another workdir"
            ) from error

    def _open(self) -> ocp.CheckpointManager:
        self._remove_leftovers()
        with places.os_errors(self._directory):
            return orbax.manager(self._directory, self._keep, self._spared)

    def _probe(self) -> None:
        """Raises OSError where nothing can be written; what it writes has no name, so it leaves."""
        with tempfile.TemporaryFile(dir=self._directory, buffering=0) as file:
            file.write(b" ")

    def _write(
        self, manager: ocp.CheckpointManager, position: int, state: PyTree, meta: dict[str, Any]
    ) -> None:
        self._remove_leftovers()
        if not places.in_bucket(self._directory) and not self._directory.exists():
            self._directory.mkdir(parents=True)
            warn(f"{self._directory} had vanished with all checkpoints; it is made anew")
        manager.reload()  # it believes in what it has seen before
        args = ocp.args.Composite(state=ocp.args.PyTreeSave(state), meta=ocp.args.JsonSave(meta))
        manager.save(position, args=args, force=True)

    def _attempt(self, act: Callable[[ocp.CheckpointManager], Any]) -> str:
        """What went wrong where it is written, in the first process; empty where nothing did."""
        fault = ""
        if self._manager:
            try:
                act(self._manager)
            except Exception as error:  # whatever the writers meet
                fault = orbax.why(error)
        return cluster.told(fault)

    def _on_disk(self) -> list[int]:
        """The newest that can be looked up; where that fails, the next save does, and says why."""
        found: list[int] = []
        if cluster.is_first():
            with contextlib.suppress(UserError):
                found = positions(self._directory)[:_MOST_LISTED]
        return json.loads(cluster.told(json.dumps(found)))

    def _remove_leftovers(self) -> None:
        """What killed and failed saves wrote; nothing may be in flight."""
        if not places.in_bucket(self._directory):
            for path in self._directory.glob("*.orbax-checkpoint-tmp*"):
                # The threads of a save that failed a moment ago may still be writing there. Orbax's
                # own clean-up fails the next save then; this one removes the rest before it.
                places.remove_tree(path)
            return
        with contextlib.suppress(OSError):
            for position in numbered(self._directory):
                path = self._directory / str(position)
                if not orbax.is_committed(path):
                    warn(f"{path} was never finished ({orbax.COMMITTED} is missing): removed")
                    places.remove_tree(path)

    def _failed(self, position: int, why: str) -> None:
        self._failures += 1
        # A new manager starts clean and counts as old checkpoints only what is on disk. Where even
        # that fails, the next save does, and tries again.
        if self._manager:
            with contextlib.suppress(Exception):
                self._manager.close()
            with contextlib.suppress(Exception):
                self._manager = self._open()
        if self._failures == _FAILURES_IN_A_ROW:
            raise UserError(
                f"{_FAILURES_IN_A_ROW} saves in a row failed in {self._directory}, the last at "
                f"batch {position}: {why}; free some space there, or make it a directory that can "
                "be written, then start again"
            )
        newest = max(self._on_disk(), default=None)
        left = "no other is there" if newest is None else f"the one of batch {newest} is in place"
        said = f"checkpoint of batch {position} was not saved: {why}; going on, {left}"
        warn(said, everyone=False)

    def _set_aside(self, damaged: list[int]) -> None:
        # Beside, not inside: whoever lists DIRECTORY finds checkpoints only.
        aside = self._directory.parent / f"{self._directory.name}-damaged"
        with cluster.together():
            if self._manager:
                self._move(damaged, aside)
                self._manager.reload()
        warn(f"damaged checkpoints were moved to {aside}", everyone=False)

    def _move(self, damaged: list[int], aside: Path) -> None:
        try:
            aside.mkdir(exist_ok=True)
            for position in damaged:
                target, copies = aside / str(position), 0
                while target.exists():
                    copies += 1
                    target = aside / f"{position}.{copies}"
                path = self._directory / str(position)
                places.move_tree(path, target, first=orbax.COMMITTED)
        except OSError as error:
            raise UserError(
                f"damaged checkpoints cannot be moved to {aside}: {reason(error)}; move them "
                "away, so that their positions can be saved again"
            ) from error


def _differences(saved: dict[str, str], wanted: dict[str, str]) -> list[str]:
    """What a user needs to hear about leaves that are missing, unknown or of another form."""
    return [
        f"{path} is {saved.get(path, 'absent')} there and {wanted.get(path, 'absent')} here"
        for path in wanted | saved
        if saved.get(path) != wanted.get(path)
    ]
