"""The flags of `train.py`; a mistake in them is one line that names the field and the remedy."""

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from stvit_jax import config as configs
from stvit_jax.errors import UserError, did_you_mean

_CONFIG = config_flags.DEFINE_config_file("config", None, "configs/NAME.py[:ARG]")
_WORKDIR = flags.DEFINE_string("workdir", None, "directory of checkpoints and metrics")


def run(act: Callable[[ConfigDict, Path], int]) -> None:
    """Parses the command line, calls `act` and exits with its code, or 1 after a `UserError`."""

    def guarded(inner: Callable[[list[str]], Any]) -> Callable[[list[str]], Any]:
        def outer(argv: list[str]) -> Any:
            try:
                return inner(argv)
            except UserError as error:
                print(f"error: {error}", file=sys.stderr, flush=True)
                sys.exit(1)

        return outer

    app.run(
        guarded(lambda _: act(_CONFIG.value, Path(_WORKDIR.value).expanduser().absolute())),
        flags_parser=guarded(parse),
    )


def parse(argv: list[str]) -> list[str]:
    """Absl's parsing of the flags; returns what is left.

    Raises:
      UserError: a mistake in the command line or in the config file that it names.
    """
    rest = read_config(flags.FLAGS, argv)
    if flags.FLAGS["config"].value is None or flags.FLAGS.workdir is None:
        raise UserError("write: python train.py --config configs/NAME.py --workdir DIR")
    if flags.FLAGS["verbosity"].using_default_value:
        logging.set_verbosity(logging.WARNING)  # libraries log dozens of lines of information
    if len(rest) > 1:
        raise UserError(f"{rest[1]!r} is no flag; write --config.FIELD=VALUE")
    return rest


def read_config(values: flags.FlagValues, argv: list[str]) -> list[str]:
    """Parses flags of which one, `config`, is a config file with overrides; returns what is left.

    Raises:
      UserError: as `parse`.
    """
    _check_config_file(argv)
    try:
        rest = values(argv)
    except Exception as error:  # ml_collections lets whatever it meets through
        raise UserError(_explain(argv, error)) from error
    if (config := values["config"].value) is not None:
        # A shell leaves the ~ of --config.data.dir=~/data as it is.
        config.data.dir = os.path.expanduser(config.data.dir)
        config.init_from = os.path.expanduser(config.init_from)
    return rest


def _check_config_file(argv: list[str]) -> None:
    """Ml_collections takes a missing file for a config, and fails at its first use."""
    for argument, following in zip(argv, [*argv[1:], ""], strict=True):
        if match := re.match(r"--?config(?:=(.*))?\Z", argument):
            path = (match.group(1) or following).split(":")[0]
            if not Path(path).is_file():
                known = ", ".join(sorted(map(str, Path("configs").glob("[!_]*.py"))))
                raise UserError(f"there is no config {path!r}; here are: {known or 'none'}")


def _explain(argv: list[str], error: Exception) -> str:
    for argument in argv:
        if match := re.match(r"--?(?:no)?config\.([\w.]+)", argument):
            if unknown := _unknown_field(match.group(1)):
                return unknown
    lines = str(error).strip().splitlines()
    if "Traceback" in str(error):  # of the config file; its last line says what is wrong
        reason = lines[-1].strip().removeprefix("stvit_jax.errors.UserError: ")
        return f"{lines[0].split(': Error whilst')[0]}: {reason}"
    return " ".join(lines)


def _unknown_field(field: str) -> str | None:
    known = _fields(configs.base())
    if field in known:
        return None
    hint = did_you_mean(f"config.{field}", [f"config.{name}" for name in known])
    return f"there is no field config.{field}; {hint}stvit_jax/config.py lists all fields"


def _fields(config: ConfigDict, prefix: str = "") -> list[str]:
    names = []
    for name in config:
        value = config[name]
        nested = _fields(value, f"{prefix}{name}.") if isinstance(value, ConfigDict) else []
        names += nested or [prefix + name]
    return names
