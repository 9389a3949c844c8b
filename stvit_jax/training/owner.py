"""Who owns a workdir: one run at a time writes there.

`owner.json` says who, and a thread renews it every few seconds. Another run on the same machine
sees at once whether that process still lives; one on another machine, whose clock may differ, looks
whether the file is renewed. So an owner that was killed stands in nobody's way.
"""

import contextlib
import dataclasses
import json
import os
import secrets
import socket
import threading
import time
from pathlib import Path
from typing import Any

from stvit_jax import places
from stvit_jax.console import duration, say, warn
from stvit_jax.errors import UserError, one_line, reason
from stvit_jax.training import signals, workdir

OWNER = "owner.json"
BEAT = 10.0  # seconds between two signs of life
LOOKING = 3 * BEAT  # seconds that another machine's owner is looked at


@dataclasses.dataclass(frozen=True)
class Claim:
    """What the file says.

    Attributes:
      token: random, of one run.
      host: name of its machine.
      process: its id there.
      machine: what tells machines, and containers on them, apart; "" where that is not known.
      born: when that process started, by the machine's own count; ids are used again.
      since: seconds of the epoch.
      beats: how often it was renewed.
    """

    token: str
    host: str
    process: int
    machine: str
    born: str
    since: float
    beats: int

    @classmethod
    def own(cls) -> "Claim":
        """That of this process."""
        process = os.getpid()
        token, host = secrets.token_hex(8), socket.gethostname()
        return cls(token, host, process, _machine(), _born(process), time.time(), 0)

    @classmethod
    def read(cls, path: Path) -> "Claim | None":
        """None where there is none, or something else.

        Raises:
          UserError: the file cannot be read.
        """
        try:
            with places.os_errors(path):
                text = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UserError(f"{path} cannot be read: {reason(error)}; see to it") from error
        with contextlib.suppress(ValueError, TypeError, LookupError, RecursionError):
            content: dict[str, Any] = json.loads(text)
            fields = {f.name: f.type(content[f.name]) for f in dataclasses.fields(cls)}
            return cls(**fields) if 0 <= fields["since"] < 1e11 else None
        return None

    def __str__(self) -> str:
        began = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(self.since))
        age = duration(max(0.0, time.time() - self.since))
        return f"process {self.process} on {one_line(self.host)}, since {began} ({age})"


class Owner(contextlib.AbstractContextManager):
    """Owns a workdir inside a `with`."""

    def __init__(self, where: Path) -> None:
        """Takes it.

        Raises:
          UserError: another run that lives owns it, or nothing can be written there.
        """
        self._where, self._path = where, where / OWNER
        other = Claim.read(self._path)
        if other and self._lives(other):
            raise UserError(
                f"{where} is in use by {other}: stop that run, or take another --workdir"
            )
        self._claim = Claim.own()
        self._write()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="owner", daemon=True)
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        """Gives it up."""
        self._closed.set()
        self._thread.join(BEAT)
        with contextlib.suppress(UserError, OSError), places.os_errors(self._path):
            if self._is_ours():
                self._path.unlink()

    def _lives(self, other: Claim) -> bool:
        if other.machine and other.machine == _machine():
            return bool(other.born) and _born(other.process) == other.born
        say(f"{self._where} was left by {other}: looking for {LOOKING:.0f} s whether that lives")
        deadline = time.monotonic() + LOOKING
        while time.monotonic() < deadline:
            time.sleep(1)
            now = Claim.read(self._path)
            if now is None:
                return False
            if now != other:
                return True
        return False

    def _write(self) -> None:
        workdir.replace(self._path, json.dumps(dataclasses.asdict(self._claim)) + "\n")

    def _is_ours(self) -> bool:
        found = Claim.read(self._path)
        if found and found.token != self._claim.token:
            # Both began at one moment, or this one was suspended. Two must not write there.
            signals.end(1, f"error: {self._where} is in use by {found}: this run ends")
        return found is not None

    def _renew(self) -> None:
        complained = False
        while not self._closed.wait(BEAT):
            try:
                self._is_ours()
                self._claim = dataclasses.replace(self._claim, beats=self._claim.beats + 1)
                self._write()
            except UserError as error:
                if not complained:
                    warn(f"{error}; meanwhile another machine may take this workdir for abandoned")
                complained = True


def _machine() -> str:
    """Of this boot of this machine, and of this container's processes."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return ""


def _born(process: int) -> str:
    """When a process started, in ticks; empty where there is none, or it has ended."""
    with contextlib.suppress(OSError, IndexError):
        after_name = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return "" if after_name[0] in "ZX" else after_name[19]
    return ""
