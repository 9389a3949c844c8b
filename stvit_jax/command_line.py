"""The command lines of this project: one way to end them, and config files with overrides.

A mistake is one line that names the field or the file and the remedy.
"""

import argparse
import concurrent.futures.thread
import contextlib
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from absl import flags
from ml_collections import ConfigDict, config_flags

from stvit_jax import cluster, places
from stvit_jax.config import field_names
from stvit_jax.errors import UserError, did_you_mean, one_line, reason

PATIENCE = 10  # seconds that a program which is over waits for threads of libraries


def entry(main: Callable[[], int | None]) -> NoReturn:
    """Runs a command to its exit code: what `main` returns (None: 0), or 1 after one line."""
    try:
        code = main() or 0
    except UserError as error:
        cluster.tell(str(error))
        code = 1
    except OSError as error:  # of the system, and nobody below knew more about it
        where = f"{one_line(error.filename)}: " if error.filename else ""
        cluster.tell(f"{where}{reason(error)}")
        code = 1
    _leave(code)


def _leave(code: int) -> NoReturn:
    """Ends the program; a thread of a library that hangs, in a read say, does not keep it."""
    deadline = time.monotonic() + PATIENCE
    # Python waits for all that are no daemons, and for those of executors, whatever they are.
    pooled = getattr(concurrent.futures.thread, "_threads_queues", ())
    others = [
        thread
        for thread in threading.enumerate()
        if (not thread.daemon or thread in pooled) and thread is not threading.main_thread()
    ]
    for thread in others:
        # Of Python: a thread of Orbax raises what ended it at whoever joins it.
        threading.Thread.join(thread, max(0.0, deadline - time.monotonic()))
    if any(thread.is_alive() for thread in others):
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
    sys.exit(code)


def train(argv: Sequence[str], usage: str) -> tuple[ConfigDict, Path, cluster.Membership | None]:
    """The flags of `train.py`.

    Returns:
      The config; the absolute workdir, which may be in a bucket; this process's place among
      several, where that is given.

    Raises:
      UserError: a mistake in the command line or in the config file that it names.
    """
    flags_of = parser("train.py", usage)
    flags_of.add_argument("--config", metavar="configs/NAME.py[:ARG]")
    flags_of.add_argument("--workdir", metavar="DIR", help="of checkpoints and metrics")
    flags_of.add_argument("--coordinator_address", metavar="HOST:PORT", help="of process 0")
    flags_of.add_argument("--num_processes", metavar="N", type=int, help="on all hosts together")
    flags_of.add_argument("--process_id", metavar="I", type=int, help="of this one, 0 to N-1")
    known, rest = flags_of.parse_known_args(argv)
    if not known.config or known.workdir is None:
        raise UserError("write: python train.py --config configs/NAME.py --workdir DIR")
    membership = _membership(known.coordinator_address, known.num_processes, known.process_id)
    config, workdir = read_config(known.config, rest), places.place("--workdir", known.workdir)
    return config, workdir, membership


def _membership(
    coordinator: str | None, processes: int | None, process: int | None
) -> cluster.Membership | None:
    given = {
        "--coordinator_address": coordinator,
        "--num_processes": processes,
        "--process_id": process,
    }
    missing = [flag for flag, value in given.items() if value is None]
    if len(missing) == len(given):
        return None
    if missing:
        raise UserError(
            f"{' and '.join(missing)} must be given, too: {', '.join(given)} go together (none of "
            "them where SLURM, Open MPI, Kubernetes or a TPU slice starts the processes)"
        )
    return cluster.Membership(coordinator, processes, process)


def read_config(path: str, overrides: Sequence[str]) -> ConfigDict:
    """A config file (`configs/NAME.py[:ARG]`) with `--config.FIELD=VALUE` applied.

    Raises:
      UserError: there is no such file, field or value; or something else was written.
    """
    file = path.split(":")[0]
    if not Path(file).is_file():  # ml_collections fails at the first use only
        known = ", ".join(sorted(map(str, Path("configs").glob("[!_]*.py"))))
        raise UserError(f"there is no config {file!r}; here are: {known or 'none'}")
    values = flags.FlagValues()
    holder = config_flags.DEFINE_config_file("config", flag_values=values)
    arguments = [sys.argv[0], f"--config={path}", *overrides]
    before, sys.argv = sys.argv, arguments  # where config_flags looks for the overrides
    try:
        rest = values(arguments)
    except Exception as error:  # ml_collections lets whatever it meets through
        raise UserError(_explain(overrides, error)) from error
    finally:
        sys.argv = before
    if len(rest) > 1:
        raise UserError(f"{one_line(rest[1])!r} is no flag; write --config.FIELD=VALUE")
    config = holder.value
    # A shell leaves the ~ of --config.data.dir=~/data as it is.
    config.data.dir = os.path.expanduser(config.data.dir)
    config.init_from = os.path.expanduser(config.init_from)
    return config


def local_path(flag: str, text: str) -> Path:
    """As `places.place`, for what is written to a disk only.

    Raises:
      UserError: as that, or it is an address.
    """
    if places.is_address(text):
        raise UserError(f"{flag} {one_line(text)}: give a path on this machine, and copy from it")
    return places.place(flag, text)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; {self.prog} --help says what there is")


def parser(program: str, usage: str) -> argparse.ArgumentParser:
    """Of a command, as people write it: its docstring as help, mistakes as UserError."""
    return _Parser(
        prog=program,
        description=usage,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def _explain(overrides: Sequence[str], error: Exception) -> str:
    known = field_names()
    for argument in overrides:
        name = re.sub(r"^--?(no)?", "", argument).split("=")[0]
        if name.startswith("config."):
            field = name.removeprefix("config.")
            if field not in known:
                hint = did_you_mean(name, [f"config.{f}" for f in known], cutoff=0.4)
                return (
                    f"there is no field {one_line(name)}; {hint}stvit_jax/config.py lists all "
                    "fields"
                )
        elif argument.startswith("-") and (near := _field_like(name, known)):
            return f"there is no flag --{name}; write --config.{near}=VALUE"
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if "Traceback" in str(error):  # of the config file; its last line says what is wrong
        why = lines[-1].strip().removeprefix("stvit_jax.errors.UserError: ")
        return f"{lines[0].split(': Error whilst')[0]}: {one_line(why)}"
    return one_line(" ".join(lines))


def _field_like(name: str, known: Sequence[str]) -> str | None:
    """The field that a flag without `config.` stands for."""
    return next((f for f in known if name in (f, f.split(".")[-1])), None)
