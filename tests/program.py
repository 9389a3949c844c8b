"""Runs `train.py` as a user does: a process, a workdir, signals."""

import contextlib
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
# Narrow networks. Programs have one of two stages, of which the first samples: half of a program's
# time is tracing and compiling the network, and what is tested is the program around it.
NARROW_SETTINGS = {
    "embed_dim": (8, 8, 16, 16),
    "depths": (1, 1, 1, 1),
    "num_heads": (1, 1, 2, 2),
    "projection": 16,
}
TWO_STAGES = {
    "embed_dim": (8, 16),
    "depths": (1, 1),
    "num_heads": (1, 2),
    "n_iter": (1, 1),
    "stoken_size": (4, 1),
    "layerscale": (False, True),
    "projection": 16,
}
NARROW = tuple(f"--config.model.{field}={value}" for field, value in TWO_STAGES.items())

STEPS = 30  # an epoch has 22
WORKER = "--config.data.workers=1"  # as the config has it; most runs do without, to start sooner


# TensorFlow, which writes files for TensorBoard and nothing else, takes seconds to import. For most
# tests it is missing, as it may be for a user.
WITHOUT_TENSORFLOW = {"PYTHONPATH": str(Path(__file__).parent / "without_tensorflow")}


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """For programs that start in it: PyTorch's threads wait for each other on a busy machine."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


class Program:
    """One run of train.py; `wait` gives the exit code, `output` all that was printed."""

    def __init__(
        self,
        workdir: str | Path,
        *flags: str,
        config: str = "configs/digits.py",
        tensorflow: bool = False,
        devices: int = 1,
        **environment: str | None,
    ) -> None:
        """`environment` are variables; None: without it."""
        command = [sys.executable, "train.py", "--config", config, "--workdir", str(workdir)]
        count = f"--xla_force_host_platform_device_count={devices}"
        environment = {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {count}"} | environment
        variables = os.environ | environment | ({} if tensorflow else WITHOUT_TENSORFLOW)
        self.output = ""
        self._process = subprocess.Popen(
            [*command, *flags],
            cwd=ROOT,
            env={name: value for name, value in variables.items() if value is not None},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def read_until(self, pattern: str) -> None:
        """Reads the console up to a line that matches."""
        for line in self._process.stdout:
            self.output += line
            if re.search(pattern, line):
                return
        raise AssertionError(f"{pattern!r} was never printed:\n{self.output}")

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def limit_files(self, size: int | None) -> None:
        """Lets it write no file beyond so many bytes; None: any."""
        _, hard = resource.prlimit(self._process.pid, resource.RLIMIT_FSIZE)
        limit = hard if size is None else size
        resource.prlimit(self._process.pid, resource.RLIMIT_FSIZE, (limit, hard))

    def children(self) -> list[int]:
        """Ids of the processes that it has started."""
        pid = self._process.pid
        tasks = Path(f"/proc/{pid}/task").glob("*/children")
        return [int(child) for task in tasks for child in task.read_text().split()]

    def wait(self, timeout: float = 300) -> int:
        output, _ = self._process.communicate(timeout=timeout)
        self.output += output
        return self._process.returncode


class Processes:
    """Several runs of train.py that are one: as on so many hosts, two devices each."""

    def __init__(
        self,
        count: int,
        workdir: str | Path,
        *flags: str,
        own: dict[int, list[str]] | None = None,
        **options: Any,
    ) -> None:
        """`own` are flags of single processes, by number."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        joining = [f"--coordinator_address={address}", f"--num_processes={count}"]
        # Not the small programs: one process may read them while another writes.
        kept = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1"}
        options = {"devices": 2} | kept | options
        self.programs = [
            Program(
                workdir, *flags, *joining, f"--process_id={i}", *(own or {}).get(i, []), **options
            )
            for i in range(count)
        ]

    def wait(self, timeout: float = 300) -> list[int]:
        """The exit codes."""
        return [program.wait(timeout) for program in self.programs]

    @property
    def output(self) -> str:
        return "\n".join(program.output for program in self.programs)


def metrics(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def values(workdir: Path, key: str) -> dict[int, float]:
    """What was written under `key`, by step."""
    return {line["step"]: line[key] for line in metrics(workdir) if key in line}


def digests(workdir: Path, step: int) -> dict[str, str]:
    """The digest of every leaf of a checkpoint."""
    meta = json.loads((workdir / f"checkpoints/{step}/meta/metadata").read_text())
    return meta["digests"]


def assert_equal_runs(workdir: Path, straight: Path) -> None:
    assert digests(workdir, STEPS) == digests(straight, STEPS)
    for key in ("train/loss", "train/learning_rate", "eval/top1", "eval_ema/loss"):
        assert values(workdir, key) == values(straight, key), key
    steps = [line["step"] for line in metrics(workdir) if "train/loss" in line]
    assert steps == list(range(1, STEPS + 1))  # no line twice, none missing
