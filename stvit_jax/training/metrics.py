"""Where numbers go: `metrics.jsonl` and TensorBoard files. Written, and never read to decide.

A log is unimportant: what cannot be written is said once, and the training goes on.
"""

import contextlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from stvit_jax.console import say, warn
from stvit_jax.errors import described, reason


class MetricWriter:
    """Writes metrics of a step to `metrics.jsonl` and, where TensorFlow is present, TensorBoard.

    TensorFlow takes seconds to import, so everything for TensorBoard happens in a thread.
    """

    def __init__(self, workdir: Path) -> None:
        self._path = workdir / "metrics.jsonl"
        self._complained = self._half_line = False
        self._thread = ThreadPoolExecutor(1)
        self._tensorboard: Any = None
        self._thread.submit(self._open_tensorboard, workdir)

    def write(self, step: int, epoch: float, metrics: dict[str, float], **notes: Any) -> None:
        """One line: `step`, `epoch`, the metrics, and notes, which are no numbers to plot."""
        line = json.dumps({"step": step, "epoch": round(epoch, 4), **metrics, **notes})
        try:
            # Opened for every line: a file that was moved away, or a disk that had been full,
            # costs the lines of that time only.
            with self._path.open("ab", buffering=0) as file:
                data = f"{line}\n".encode()
                data = b"\n" + data if self._half_line else data
                self._half_line = file.write(data) < len(data)  # the disk is full
        except OSError as error:
            if not self._complained:
                warn(f"{self._path} cannot be written ({reason(error)}): lines are missing there")
            self._complained = True
        self._thread.submit(self._write_tensorboard, step, metrics)

    def close(self) -> None:
        """Waits until everything is on disk."""
        self._thread.submit(self._close_tensorboard)
        self._thread.shutdown()

    # Below: in the thread.

    def _open_tensorboard(self, workdir: Path) -> None:
        os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # else TensorFlow greets with lines
        try:
            from clu import metric_writers

            self._tensorboard = metric_writers.SummaryWriter(str(workdir))
        except Exception as error:  # not installed; installed and broken; no room for its file
            say(f"no TensorBoard files ({described(error)}); metrics.jsonl has everything")

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


def keep_lines(workdir: Path, step: int, evaluation: bool) -> None:
    """Removes from `metrics.jsonl` what a run that goes on after `step` will write again.

    These are lines of later steps, half-written ones and, unless `evaluation` is to be kept, those
    of the step's own evaluation. Whole lines that are none of ours stay as they are.
    """
    path = workdir / "metrics.jsonl"
    try:
        before = path.read_bytes() if path.is_file() else b""
        lines = before.splitlines(keepends=True)
        kept = b"".join(line for line in lines if _stays(line, step, evaluation))
        # Replaced only where it must be: another process may be writing its evaluation there.
        if kept != before:
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
