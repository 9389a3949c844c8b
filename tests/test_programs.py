"""Where compiled programs are kept between runs."""

import stat
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from stvit_jax import programs

OPTIONS = ("jax_compilation_cache_dir", "jax_persistent_cache_enable_xla_caches")


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A user with a home, who has set nothing; JAX is afterwards as it was."""
    before = {name: getattr(jax.config, name) for name in OPTIONS}
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def kept(capsys: pytest.CaptureFixture[str], deterministic: bool = False) -> tuple[str | None, str]:
    """The folder, and all that is said."""
    programs.keep(deterministic=deterministic)
    programs.describe("kernels: XLA's own")
    said = capsys.readouterr()
    assert "kernels: XLA's own\n" in said.out
    said = (said.out + said.err).replace("kernels: XLA's own\n", "")
    return jax.config.jax_compilation_cache_dir, said


@pytest.mark.parametrize("stated, expected", [(None, "home/.cache"), ("caches", "caches")])
def test_they_are_kept_in_the_users_cache_folder(stated, expected, monkeypatch, capsys, tmp_path):
    if stated:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / stated))
    expected = tmp_path / expected / "stvit_jax"
    assert kept(capsys) == (str(expected), f"compiled programs are kept in {expected}\n")
    assert stat.S_IMODE(expected.stat().st_mode) == 0o700 and not list(expected.iterdir())


def test_a_cache_folder_that_is_no_whole_path_does_not_count(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", "caches")
    assert kept(capsys)[0] == str(tmp_path / "home/.cache/stvit_jax")


@pytest.mark.parametrize("asked", ["here/there", "gs://bucket/programs"])
def test_a_folder_that_is_asked_for_is_taken(asked, capsys, tmp_path):
    asked = asked if "://" in asked else str(tmp_path / asked)
    jax.config.update("jax_compilation_cache_dir", asked)
    assert kept(capsys) == (asked, f"compiled programs are kept in {asked}\n")
    assert [path.name for path in tmp_path.iterdir()] == (["here"] if "://" not in asked else [])


def test_an_empty_name_keeps_none(capsys, tmp_path):
    jax.config.update("jax_compilation_cache_dir", "")
    assert kept(capsys) == (None, "")
    assert not list(tmp_path.iterdir())


def test_where_nothing_can_be_written_it_is_said_once(capsys, tmp_path):
    (tmp_path / "home").touch()
    folder, said = kept(capsys)
    assert folder is None
    assert said.startswith("compiled programs cannot be kept in ") and "Not a directory" in said
    assert said.count("\n") == 1 and "set JAX_COMPILATION_CACHE_DIR to a folder" in said


@pytest.mark.parametrize("deterministic", [False, True])
def test_choices_of_autotuning_stay_in_the_workdir_of_a_deterministic_run(deterministic, capsys):
    """JAX would set the flag that `parallel` sets, to a folder beside the programs."""
    kept(capsys, deterministic)
    beside = "autotune_cache" in jax.config.jax_persistent_cache_enable_xla_caches
    assert beside != deterministic
