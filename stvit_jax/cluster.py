"""Several processes that run one program, each with devices of its own, and how they agree.

The engine is JAX's: `jax.distributed` joins them, its service carries barriers, its collectives the
rest. What only one process knows (a fault of its data, what is on the disk, a failed save) becomes
known to all here, before anybody acts on it: a process that went another way than the others would
leave them waiting in a collective for ever.

One process starts nothing: every function here then answers at once.
"""

import contextlib
import dataclasses
import importlib.util
import itertools
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from stvit_jax import console
from stvit_jax.errors import UserError, described, one_line

JOINING = 50  # seconds that all processes have to find each other
WAITING = 600  # seconds that one that is ready waits for the others
ENDING = 20  # seconds that one that fails waits for the others to do so, too
HEARTBEAT = 60  # seconds without a sign of life after which a process counts as dead
_LONGEST = 2048  # bytes of what a process says to the others

_rounds = itertools.count()


@dataclasses.dataclass(frozen=True)
class Membership:
    """What this process is told of its place, by flags.

    Attributes:
      coordinator: HOST:PORT on which process 0 listens.
      processes: how many there are.
      process: the number of this one.
    """

    coordinator: str
    processes: int
    process: int

    def __post_init__(self) -> None:
        """Raises UserError where it makes no sense."""
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
            raise UserError(
                f"--coordinator_address {one_line(self.coordinator)!r} is no HOST:PORT: give the "
                "host of process 0 and a free port there, the same to every process"
            )
        if not 0 <= self.process < self.processes:
            raise UserError(
                f"--process_id {self.process} is none of 0 to {self.processes - 1}, as "
                f"--num_processes {self.processes} has it"
            )


def join(membership: Membership | None) -> None:
    """Joins the other processes, if there are any: as flags say, or what started this program.

    To be called before anything touches a device. From then on only process 0 has a voice on
    standard output, and the others give their number.

    Raises:
      UserError: they do not find each other within a minute, or do not agree on their number.
    """
    arguments = _of_flags(membership) if membership else _of_launcher()
    if arguments is None:
        return
    import jax

    if membership and membership.process:
        _reach(membership.coordinator)
    with _deadline(membership):
        try:
            jax.distributed.initialize(
                initialization_timeout=10 * JOINING,  # the deadline is ours: theirs aborts
                heartbeat_timeout_seconds=HEARTBEAT,
                shutdown_timeout_seconds=ENDING,
                **arguments,
            )
        except ValueError as error:
            if membership is None and "coordinator_address" in str(error):
                return  # JAX knows of no other process
            raise UserError(f"the processes cannot be joined: {one_line(error)}") from error
        except RuntimeError as error:
            raise UserError(
                f"the processes cannot be joined ({one_line(error)}): is the port taken? Give "
                "another one to all of them"
            ) from error
        if membership and jax.process_count() != membership.processes:
            raise UserError(
                f"process 0 counts {jax.process_count()} processes, and this one was started with "
                f"--num_processes {membership.processes}: give the same number to all"
            )
        if jax.process_count() == 1:  # a slice of one host, say
            signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))  # JAX has taken it
            return
        console.number = jax.process_index()
        barrier(JOINING)
    console.say(
        f"process {jax.process_index()} of {jax.process_count()}: {jax.local_device_count()} of "
        f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        everyone=True,
    )


def joined() -> bool:
    """Whether there are other processes."""
    jax = sys.modules.get("jax")  # who has not imported it has not joined
    return jax is not None and jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
    """Whether this process is the one that writes what all of them have in common."""
    return console.number in (None, 0)


def barrier(patience: float = WAITING) -> None:
    """Returns when every process is here.

    Raises:
      UserError: some are not, after so many seconds.
    """
    if not joined():
        return
    import orbax.checkpoint as ocp

    wait = ocp.multihost.get_barrier_sync_fn()
    try:
        wait(key=f"stvit_jax/{next(_rounds)}", timeout_ms=round(patience * 1000))
    except RuntimeError as error:
        raise UserError(
            f"other processes are missing ({one_line(error)}): look at what they say; the same "
            "command on every host continues"
        ) from error


def gather(text: str) -> list[str]:
    """What every process says, in the order of their numbers; all have to ask."""
    if not joined():
        return [text]
    import numpy as np
    from jax.experimental import multihost_utils

    barrier()  # the collective below is not patient
    mine = np.zeros(_LONGEST, np.uint8)
    data = np.frombuffer(text.encode()[:_LONGEST], np.uint8)
    mine[: len(data)] = data
    everybody = np.asarray(multihost_utils.process_allgather(mine)).reshape(-1, _LONGEST)
    return [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in everybody]


def told(text: str) -> str:
    """What process 0 says, to all; all have to ask."""
    return gather(text if is_first() else "")[0]


@contextlib.contextmanager
def together() -> Iterator[None]:
    """A block that ends in all processes alike: what goes wrong in one of them ends it in all."""
    own: Exception | None = None
    try:
        yield
    except Exception as error:
        own = error
    agree_on(own)


def agree_on(fault: Exception | None) -> None:
    """Ends all processes where one has met a fault; all have to ask.

    Raises:
      UserError: its own, or the first of another's, with the number. Among several processes it
        stands for any other kind.
    """
    faults = gather((str(fault) or type(fault).__name__) if fault else "")
    if isinstance(fault, UserError) or (fault and not joined()):
        raise fault
    if fault:  # of the kind that the others raise: what follows has to be the same
        raise UserError(described(fault)) from fault
    for process, text in enumerate(faults):
        if text:
            raise UserError(f"process {process}: {text}")


def tell(fault: str) -> None:
    """Tells of the error that ends this process: what all of them end with, one tells.

    Does not return where this one ends alone: an orderly exit would wait for the others.
    """
    if not joined():
        console.warn(f"error: {fault}")
        return
    import orbax.checkpoint as ocp

    try:
        wait = ocp.multihost.get_barrier_sync_fn()
        wait(key="stvit_jax/end", timeout_ms=ENDING * 1000)
    except RuntimeError:
        console.warn(f"error: {fault}")
        os._exit(1)
    faults = gather(fault)
    more = (f"process {i}: {text}" for i, text in enumerate(faults) if text not in fault)
    for words in dict.fromkeys([fault, *more]):
        console.warn(f"error: {words}", everyone=False)


def _of_flags(membership: Membership) -> dict[str, Any] | None:
    if membership.processes == 1:
        return None
    return {
        "coordinator_address": membership.coordinator,
        "num_processes": membership.processes,
        "process_id": membership.process,
        "cluster_detection_method": "deactivate",
    }


def _of_launcher() -> dict[str, Any] | None:
    """What to tell JAX where something that it knows has started several of us; else None."""

    def several(variable: str) -> bool:
        count = os.environ.get(variable, "")
        return count.isdecimal() and int(count) > 1

    if "SLURM_STEP_NODELIST" in os.environ:  # of srun; a batch script is no step
        return {} if several("SLURM_NTASKS") else None
    if "OMPI_COMM_WORLD_SIZE" in os.environ:
        return {} if several("OMPI_COMM_WORLD_SIZE") else None
    if several("PMI_SIZE") and importlib.util.find_spec("mpi4py"):  # MPICH, Intel MPI
        return {"cluster_detection_method": "mpi4py"}
    if "KUBERNETES_SERVICE_HOST" in os.environ and "JOB_COMPLETION_INDEX" in os.environ:
        return {}
    platforms = os.environ.get("JAX_PLATFORMS", "tpu")
    if "tpu" in platforms and importlib.util.find_spec("libtpu"):
        return {}  # a slice of one host or of many: its machines know
    return None


def _reach(coordinator: str) -> None:
    """Waits until process 0 listens; JAX itself would abort with its own stack."""
    host, _, port = coordinator.rpartition(":")
    deadline = time.monotonic() + JOINING - 5
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"nobody answers at --coordinator_address {coordinator} "
                    f"({one_line(error.strerror or error)}): start process 0 on that host, and let "
                    "the port through its firewall"
                ) from error
            time.sleep(0.5)


@contextlib.contextmanager
def _deadline(membership: Membership | None) -> Iterator[None]:
    """Ends the program where the block lasts too long: JAX's own time-outs abort without a word."""
    if membership:
        which = f"--num_processes is {membership.processes}: "
        address = membership.coordinator
    else:
        which, address = "", "the first host"

    def expire() -> None:
        console.warn(
            f"error: the processes have not found each other within {JOINING} s: {which}has every "
            f"one been started, with a number of its own, and can it reach {address}?"
        )
        os._exit(1)

    timer = threading.Timer(JOINING, expire)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
