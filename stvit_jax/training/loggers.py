"""Services that follow runs: wandb, trackio, and whatever has their `init`, `log` and `finish`.

Nothing of a run depends on one. Its calls are made in a thread of their own; what fails is said
once, and what hangs is left behind.
"""

import importlib
import inspect
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from stvit_jax import places
from stvit_jax.console import warn
from stvit_jax.errors import described

KNOWN = ("wandb", "trackio")
PATIENCE = 60.0  # seconds that a service has at the end of a run to take what is left


class Logger:
    """One run as a service sees it. A run that goes on, goes on there."""

    def __init__(self, name: str, project: str, config: dict[str, Any], workdir: Path) -> None:
        """Begins; nothing here waits, and nothing raises.

        Args:
          name: of the package, one of `KNOWN`.
          project: that the run is listed in.
          config: the run's fields, flat.
          workdir: of the run, which is called as this folder (and a hash of its path, where a
            service knows runs by their names); local files go there.
        """
        self._name = name
        self._calls: SimpleQueue[Callable[[], Any] | None] = SimpleQueue()
        # Folders of one name are other runs.
        own = f"{workdir.name}-{zlib.crc32(str(workdir).encode()):08x}"
        how = {"project": project, "name": workdir.name, "id": own, "config": config}
        how |= {"resume": "allow"} | ({} if places.in_bucket(workdir) else {"dir": str(workdir)})
        self._calls.put(lambda: self._init(how))
        # A daemon: a program does not wait for it longer than `finish` does.
        self._thread = threading.Thread(target=self._work, daemon=True, name=f"logger {name}")
        self._thread.start()

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Metrics of a step; they are sent when the service is ready."""
        self._calls.put(lambda: self._service.log(metrics, step=step))

    def finish(self) -> None:
        """Waits until all is sent, for `PATIENCE` at most."""
        self._calls.put(lambda: self._service.finish())
        self._calls.put(None)
        self._thread.join(PATIENCE)
        if self._thread.is_alive():
            warn(f"{self._name} did not end in {PATIENCE:.0f} s; metrics.jsonl has everything")

    # Below: in the thread.

    def _init(self, how: dict[str, Any]) -> None:
        self._service = importlib.import_module(self._name)
        taken = inspect.signature(self._service.init).parameters
        if "id" not in taken:  # trackio knows a run by its name
            how = how | {"name": how["id"]}
        self._service.init(**{key: value for key, value in how.items() if key in taken})

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            try:
                call()
            except Exception as error:  # of whatever kind a service has
                install = f"; pip install {self._name}" if isinstance(error, ImportError) else ""
                warn(
                    f"no more metrics to {self._name} ({described(error)}{install}); metrics.jsonl "
                    "goes on"
                )
                return
