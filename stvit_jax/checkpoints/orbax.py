"""Orbax as it is used here: it leaves no thread behind, and says nothing of its own.

- Folders are created before a save returns. Orbax would create them in the background and let its
  other threads wait for that, five minutes where it fails; Python does not exit before they end.
- One copy of a replicated array is written as it is. Orbax would have every device write a slice of
  it, and compile a program for every slice: half a minute at the first save.
- Whatever goes wrong reaches the caller as an exception, so that nothing of Orbax's log is needed:
  dozens of lines per save, and where one fails, thousands from event loops that are closed.
"""

import contextlib
import logging
import os
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging as absl_logging

from stvit_jax import cluster, places
from stvit_jax.errors import one_line

_ORBAX = str(Path(ocp.__file__).parent)
COMMITTED = "commit_success.txt"  # the mark of a directory in a bucket that is complete
_ASYNCIO = f"{os.sep}asyncio{os.sep}"
# In what asyncio says of a task that nobody waits for any more. OCDBT is TensorStore's database.
_TRACES = (_ORBAX, "OCDBT", "tensorstore")


def checkpointer() -> ocp.Checkpointer:
    """Reads and writes directories of several items."""
    # Every process by itself: where one fails, others would wait for it in Orbax's barriers.
    own = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=own, active_processes={own})
    options = ocp.CompositeOptions(
        async_options=_in_the_foreground(), multiprocessing_options=alone
    )
    handler = ocp.CompositeCheckpointHandler(composite_options=options)
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


class _Spared(ocp.checkpoint_managers.PreservationPolicy):
    """Keeps the checkpoints of some steps, which may become others in the course of a run."""

    def __init__(self, steps: list[int]) -> None:
        self._steps = steps

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        return [checkpoint.step in self._steps for checkpoint in checkpoints]


def manager(directory: Path, keep: int, spared: list[int]) -> ocp.CheckpointManager:
    """Saves `state` and `meta` in the background, and keeps the newest, and those of `spared`."""
    # Orbax removes old ones only after the new one is committed.
    policies = ocp.checkpoint_managers
    policy = policies.AnyPreservationPolicy([policies.LatestN(n=keep), _Spared(spared)])
    # Alone among several processes: where one fails, others would wait for it in Orbax's barriers.
    alone = ocp.options.MultiprocessingOptions(active_processes={0}) if cluster.joined() else None
    options = ocp.CheckpointManagerOptions(
        preservation_policy=policy,
        async_options=_in_the_foreground(),
        create=False,
        **({"multiprocessing_options": alone} if alone else {}),
    )
    registry = ocp.type_handlers.create_type_handler_registry(
        (jax.Array, ocp.type_handlers.ArrayHandler(use_replica_parallel=False))
    )
    handlers = {
        "state": ocp.PyTreeCheckpointHandler(type_handler_registry=registry),
        "meta": ocp.JsonCheckpointHandler(),
    }
    return ocp.CheckpointManager(directory, options=options, item_handlers=handlers)


def is_committed(path: Path) -> bool:
    """Whether a directory that Orbax wrote is complete.

    On a disk it takes its name at the end; in a bucket it has it from the start, and gets a mark.

    Raises:
      OSError: the bucket does not say.
    """
    with places.os_errors(path):
        return not places.in_bucket(path) or (path / COMMITTED).exists()


def why(error: BaseException) -> str:
    """Why something could not be read or written, in the system's words where it said any."""
    if number := errno_of(error):
        return os.strerror(number)
    # TensorStore puts its own source lines and the whole request after the reason.
    said = re.sub(r" \[(source locations|tensorstore_spec)=.*", "", str(error), flags=re.DOTALL)
    return one_line(said or error)


def errno_of(error: BaseException) -> int | None:
    """The system's error number, which TensorStore writes into its text; None where there is none.

    An exception that stands for another one (`raise ... from`) has the number of that one.
    """
    if isinstance(error, OSError) and error.errno:
        return error.errno
    if found := re.search(r"os_error_code='(\d+)'", str(error)):
        return int(found[1])
    return errno_of(error.__cause__) if error.__cause__ is not None else None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drops what Orbax logs meanwhile, and what its event loops say at any time after."""
    _drop_traces()
    logger = absl_logging.get_absl_logger()
    own = _FromOrbax()  # one each, so that one that ends does not end another
    logger.addFilter(own)
    try:
        yield
    finally:
        logger.removeFilter(own)


def stay_quiet() -> None:
    """As `quiet`, to the end of the program."""
    absl_logging.get_absl_logger().addFilter(_always)  # adds it once


def _in_the_foreground() -> ocp.options.AsyncOptions:
    return ocp.options.AsyncOptions(create_directories_asynchronously=False)


class _FromOrbax(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return not record.pathname.startswith(_ORBAX)


_always = _FromOrbax()


class _Traces(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if record.exc_info and record.exc_info[2]:
            text += "".join(frame.filename for frame in traceback.extract_tb(record.exc_info[2]))
        return not any(trace in text for trace in _TRACES)


_traces = _Traces()


def _drop_traces() -> None:
    """Of what failed in an event loop asyncio speaks when that is collected: any time, or at exit.

    TensorStore has results delivered to loops that Orbax has closed since; Python calls that an
    exception nobody can catch. Everything else goes where it went.
    """
    logging.getLogger("asyncio").addFilter(_traces)  # adds it once
    if getattr(sys.unraisablehook, "drops_traces", False):
        return
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        files = [frame.filename for frame in traceback.extract_tb(unraisable.exc_traceback)]
        closed = str(unraisable.exc_value) == "Event loop is closed" and all(
            _ASYNCIO in file for file in files
        )
        code = getattr(unraisable.object, "cr_code", None)  # of a coroutine
        files += [code.co_filename] if code else []
        if not closed and not any(file.startswith(_ORBAX) for file in files):
            before(unraisable)

    hook.drops_traces = True  # type: ignore[attr-defined]
    sys.unraisablehook = hook
