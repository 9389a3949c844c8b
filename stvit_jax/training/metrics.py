"""Where numbers go: `metrics.jsonl`, TensorBoard files, a logger. Never read to decide.

A log is unimportant: what cannot be written is said once, and the training goes on.
"""

import contextlib
import json
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from stvit_jax import places
from stvit_jax.console import say, warn
from stvit_jax.errors import described, reason
from stvit_jax.training.loggers import Logger


class MetricWriter:
    """Writes metrics of a step to `metrics.jsonl` and, where TensorFlow is present, TensorBoard.

    TensorFlow takes seconds to import, so everything for TensorBoard happens in a thread; and so
    does what is put into a bucket: no step waits for it.
    """

    def __init__(self, workdir: Path, logger: Logger | None = None) -> None:
        self._workdir, self._logger = workdir, logger
        kind = _Object if places.in_bucket(workdir) else _File
        self._lines = kind(workdir / "metrics.jsonl")
        self._thread = ThreadPoolExecutor(1)
        self._tensorboard: Any = None
        self._events: tempfile.TemporaryDirectory | None = None  # TensorBoard's, for a bucket
        self._thread.submit(self._open_tensorboard, workdir)

    def describe(self, config: dict[str, Any], pictures: Callable[[], np.ndarray]) -> None:
        """For TensorBoard, of a run that begins: its fields, and some inputs.

        Args:
          config: flat.
          pictures: makes uint8 (N, H, W, 3); called in the thread, and where they can be shown.
        """
        self._thread.submit(self._describe_to_tensorboard, config, pictures)

    def write(self, step: int, epoch: float, metrics: dict[str, float], **notes: Any) -> None:
        """One line: `step`, `epoch`, the metrics, and notes, which are no numbers to plot."""
        line = json.dumps({"step": step, "epoch": round(epoch, 4), **metrics, **notes})
        self._lines.add(f"{line}\n".encode())
        self._thread.submit(self._write_tensorboard, step, metrics)
        if self._logger:
            self._logger.log(metrics | {"epoch": epoch}, step)
        if not any(name.startswith("train/") for name in metrics):
            self.flush()  # an evaluation took long enough

    def flush(self) -> None:
        """Sends what was written up to here on its way, where it waits for that: to a bucket."""
        if places.in_bucket(self._workdir):
            self._thread.submit(self._put)

    def close(self) -> None:
        """Waits until everything is where it belongs."""
        self._thread.submit(self._close_tensorboard)
        self.flush()
        self._thread.shutdown()
        if self._logger:
            self._logger.finish()
        if self._events:
            self._events.cleanup()

    # Below: in the thread.

    def _put(self) -> None:
        self._lines.put()
        try:
            for file in Path(self._events.name).iterdir() if self._events else ():
                places.put(file, self._workdir / file.name)
        except OSError as error:
            warn(f"TensorBoard files are missing in {self._workdir} for now ({reason(error)})")

    def _open_tensorboard(self, workdir: Path) -> None:
        os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # else TensorFlow greets with lines
        try:
            from clu import metric_writers

            if places.in_bucket(workdir):  # TensorFlow would take a way of its own there
                self._events = tempfile.TemporaryDirectory(prefix="stvit_jax-")
                workdir = Path(self._events.name)
            self._tensorboard = metric_writers.SummaryWriter(str(workdir))
        except Exception as error:  # not installed; installed and broken; no room for its file
            say(f"no TensorBoard files ({described(error)}); metrics.jsonl has everything")

    def _describe_to_tensorboard(
        self, config: dict[str, Any], pictures: Callable[[], np.ndarray]
    ) -> None:
        if self._tensorboard is None:
            return
        try:
            self._tensorboard.write_hparams(config)
            lines = "\n".join(f"    {name} = {value!r}" for name, value in config.items())
            self._tensorboard.write_texts(0, {"config": lines})
            self._tensorboard.write_images(0, {"inputs": pictures()})
            self._tensorboard.flush()
        except Exception as error:  # of TensorFlow, or of pictures that cannot be made
            warn(f"TensorBoard shows no config or no inputs ({described(error)}); the run goes on")

    def _write_tensorboard(self, step: int, metrics: dict[str, float]) -> None:
        if self._tensorboard is None:
            return
        try:
            self._tensorboard.write_scalars(step, metrics)
            self._tensorboard.flush()
        except Exception as error:  # TensorFlow's own kinds, of a full disk for one
            warn(f"no more TensorBoard files ({described(error)}); metrics.jsonl goes on")
            self._tensorboard = None

    def _close_tensorboard(self) -> None:
        if self._tensorboard is not None:
            with contextlib.suppress(Exception):
                self._tensorboard.close()


class _File:
    """Lines on a disk, each there as soon as it is known."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._complained = self._half_line = False

    def add(self, line: bytes) -> None:
        try:
            # Opened for every line: a file that was moved away, or a disk that had been full,
            # costs the lines of that time only.
            with self._path.open("ab", buffering=0) as file:
                data = b"\n" + line if self._half_line else line
                self._half_line = file.write(data) < len(data)  # the disk is full
        except OSError as error:
            if not self._complained:
                warn(f"{self._path} cannot be written ({reason(error)}): lines are missing there")
            self._complained = True


class _Object:
    """Lines in a bucket, where nothing can be appended: they wait, and the whole is put anew."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._waiting: list[bytes] = []
        self._complained = False

    def add(self, line: bytes) -> None:
        self._waiting.append(line)

    def put(self) -> None:
        """Adds what waits to what is there, which somebody who evaluates may have written to.

        Where that fails, it is tried again with the next.
        """
        count = len(self._waiting)
        if not count:
            return
        try:
            with places.os_errors(self._path):
                before = self._path.read_bytes() if self._path.exists() else b""
                self._path.write_bytes(before + b"".join(self._waiting[:count]))
        except OSError as error:
            if not self._complained:
                warn(f"{self._path} cannot be written ({reason(error)}): it is tried again")
            self._complained = True
        else:
            del self._waiting[:count]
            self._complained = False


def keep_lines(workdir: Path, step: int, evaluation: bool) -> None:
    """Removes from `metrics.jsonl` what a run that goes on after `step` will write again.

    These are lines of later steps, half-written ones and, unless `evaluation` is to be kept, those
    of the step's own evaluation. Whole lines that are none of ours stay as they are.
    """
    path = workdir / "metrics.jsonl"
    try:
        with places.os_errors(path):
            before = path.read_bytes() if path.is_file() else b""
        lines = before.splitlines(keepends=True)
        kept = b"".join(line for line in lines if _stays(line, step, evaluation))
        # Replaced only where it must be: another process may be writing its evaluation there.
        if kept == before:
            return
        if places.in_bucket(path):
            with places.os_errors(path):
                path.write_bytes(kept)
        else:
            whole = path.with_suffix(".tmp")
            whole.write_bytes(kept)
            whole.replace(path)
    except OSError as error:
        warn(f"{path} cannot be put in order ({reason(error)}): lines of later steps stay there")


def _stays(line: bytes, step: int, evaluation: bool) -> bool:
    try:
        content = json.loads(line)
    except (ValueError, RecursionError):
        return False
    if not line.endswith(b"\n"):
        return False
    if not isinstance(content, dict) or not isinstance(content.get("step"), int):
        return True
    if content.get("eval_only"):
        return True
    repeated = content["step"] == step and not any(key.startswith("train/") for key in content)
    return content["step"] < step or (content["step"] == step and (evaluation or not repeated))
