"""Where numbers go: `metrics.jsonl`, TensorBoard files, and lines on the console."""

import json
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from stvit_jax.console import say


class MetricWriter:
    """Writes metrics of a step to `metrics.jsonl` and, where TensorFlow is present, TensorBoard.

    TensorFlow takes seconds to import, so everything for TensorBoard happens in a thread.
    """

    def __init__(self, workdir: Path, step: int | None = None) -> None:
        """Opens the files; to go on after `step`, later and half-written lines are removed."""
        path = workdir / "metrics.jsonl"
        lines = [line for line in _read(path) if step is None or line["step"] <= step]
        kept = "".join(json.dumps(line) + "\n" for line in lines)
        # Replaced only where it must be: another process may be training in this workdir, and
        # would go on writing to the old file.
        if path.exists() and path.read_text() != kept:
            whole = path.with_suffix(".tmp")
            whole.write_text(kept)
            whole.replace(path)
        self._lines = lines
        self._file = path.open("a")
        self._thread = ThreadPoolExecutor(1)
        self._tensorboard = self._thread.submit(_open_tensorboard, workdir)
        self._writing: Future | None = None

    def write(self, step: int, epoch: float, metrics: dict[str, float]) -> None:
        """One line: `step`, `epoch` and the metrics."""
        line = {"step": step, "epoch": round(epoch, 4), **metrics}
        self._lines.append(line)
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        if self._writing is not None and self._writing.done():
            self._writing.result()  # an error of the thread arrives here
        self._writing = self._thread.submit(self._write_tensorboard, step, metrics)

    def find(self, step: int, key: str) -> dict[str, float] | None:
        """The last line with `key` of `step`, from this run or the one that it continues.

        Lines of `eval_only` do not count: they may be about other data.
        """
        for line in reversed(self._lines):
            if line["step"] == step and key in line and "eval_only" not in line:
                return line
        return None

    def close(self) -> None:
        """Waits until everything is on disk."""
        self._file.close()
        self._thread.shutdown()
        if self._writing is not None:
            self._writing.result()
        if writer := self._tensorboard.result():
            writer.close()

    def _write_tensorboard(self, step: int, metrics: dict[str, float]) -> None:
        if writer := self._tensorboard.result():
            writer.write_scalars(step, metrics)
            writer.flush()


def _read(path: Path) -> list[dict[str, Any]]:
    """All whole lines; a process that was killed may have left half of one."""
    lines = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines


def _open_tensorboard(workdir: Path) -> Any:
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # else TensorFlow greets with lines of it
    try:
        from clu import metric_writers

        return metric_writers.SummaryWriter(str(workdir))
    except ImportError as error:
        say(f"no TensorBoard files ({error}); metrics.jsonl has everything")
        return None
