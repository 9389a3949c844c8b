"""The folder of a run."""

from pathlib import Path

from stvit_jax.errors import UserError


def make_workdir(workdir: Path) -> None:
    """Creates the folder of a run.

    Raises:
      UserError: it cannot be created.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--workdir {workdir} cannot be written: {error.strerror}") from error
