"""Compiled programs, kept between runs in JAX's persistent cache.

The folder is that of JAX_COMPILATION_CACHE_DIR (empty: nothing is kept), or else the user's cache
folder. A program is found by what it computes, the compiler's version and flags, and the machine:
of a CPU its instructions count, so machines of several kinds may share a home.
"""

import os
import tempfile
from pathlib import Path

from stvit_jax import places
from stvit_jax.console import say, warn
from stvit_jax.errors import one_line


def keep(*, deterministic: bool) -> None:
    """Sets where programs are kept, before the first is compiled.

    Args:
      deterministic: the choices of a GPU's autotuning stay where `parallel` has put them, and are
        not kept beside the programs.
    """
    import jax

    if deterministic:
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
    asked = jax.config.jax_compilation_cache_dir
    if asked is None or (asked and not places.is_address(asked)):
        asked = _writable(asked)
    jax.config.update("jax_compilation_cache_dir", asked or None)


def describe(kernels: str) -> None:
    """Says what they are made of, as `Task.kernels` has it, and where they are kept."""
    import jax

    say(kernels)
    if (folder := jax.config.jax_compilation_cache_dir) and jax.config.jax_enable_compilation_cache:
        say(f"compiled programs are kept in {folder}")


def _writable(asked: str | None) -> str | None:
    """The folder, or the user's own; None, and a warning, where nothing can be written there."""
    folder: Path | str = asked or "the user's cache folder"
    try:
        folder = Path(asked) if asked else _users_own()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # who writes here can run code
        tempfile.TemporaryFile(dir=folder).close()
    except (OSError, RuntimeError) as error:  # RuntimeError: a user without a home
        warn(
            f"compiled programs cannot be kept in {folder} ({one_line(error)}), so every start "
            "compiles anew: set JAX_COMPILATION_CACHE_DIR to a folder that can be written"
        )
        return None
    return str(folder)


def _users_own() -> Path:
    stated = os.environ.get("XDG_CACHE_HOME", "")
    cache = Path(stated) if os.path.isabs(stated) else Path.home() / ".cache"
    return cache / "stvit_jax"
