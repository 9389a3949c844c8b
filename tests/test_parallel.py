"""Devices: flags that every compiler knows, and the slots of a batch that this process loads."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from stvit_jax import parallel, places
from stvit_jax.errors import UserError

DETERMINISTIC = """
import os, sys
from pathlib import Path
from stvit_jax import parallel
parallel.prepare(x64=False, deterministic=True, workdir=Path(sys.argv[1]))
import jax
print(os.environ["XLA_FLAGS"], jax.jit(lambda x: x + 1)(1))
"""


def run_with(flags: str, workdir: Path) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", DETERMINISTIC, str(workdir)],
        env=os.environ | {"XLA_FLAGS": flags},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_flags_are_known_to_xla_and_keep_those_of_the_user(tmp_path) -> None:
    """XLA ends a program whose flags it does not know."""
    count = "--xla_force_host_platform_device_count=2"
    first, patience, ops, cache, result = run_with(count, tmp_path)
    assert first == count and ops == "--xla_gpu_exclude_nondeterministic_ops=true"
    assert patience == "--xla_gpu_nccl_termination_timeout_seconds=600"
    assert cache.endswith(str(tmp_path / "autotuning")) and result == "2"
    own = "--xla_gpu_nccl_termination_timeout_seconds=7"
    assert run_with(own, tmp_path)[0] == own
    assert sum("nccl_termination" in word for word in run_with(own, tmp_path)) == 1


@pytest.mark.parametrize(
    "flags, workdir, words",
    [
        (
            "--xla_gpu_exclude_nondeterministic_ops=false",
            "/w",
            "is not honoured on a GPU: XLA_FLAGS",
        ),
        ("--xla_gpu_exclude_nondeterministic_ops=true", "/w", None),
        ("", "gs://a-bucket/run", "the choices of autotuning are not kept in a bucket"),
    ],
)
def test_where_deterministic_cannot_be_honoured_it_is_said(
    monkeypatch, capsys, flags, workdir, words
) -> None:
    monkeypatch.setenv("XLA_FLAGS", flags)
    before = jax.config.jax_enable_x64
    parallel.prepare(x64=before, deterministic=True, workdir=places.of(workdir))
    said = capsys.readouterr().err
    assert words in said if words else said == ""
    assert os.environ["XLA_FLAGS"].count("xla_gpu_exclude_nondeterministic_ops") == 1
    assert ("gs:" in os.environ["XLA_FLAGS"]) is False


def test_a_batch_is_split_evenly(monkeypatch) -> None:
    mesh = parallel.make_mesh(7 * jax.device_count())
    np.testing.assert_array_equal(parallel.own_slots(14, mesh), np.arange(14))
    monkeypatch.setattr(jax, "devices", lambda: [None] * 8)
    with pytest.raises(UserError, match="batch_size 60 is not divisible by the 8 devices"):
        parallel.make_mesh(60)
    with pytest.raises(
        UserError, match="times config.gradient_accumulation 2; use a multiple of 16"
    ):
        parallel.make_mesh(72, parts=2)


@pytest.mark.parametrize(
    "batch, group, devices, parts, message",
    [
        (1024, 128, 8, 1, None),
        (2048, 128, 8, 2, None),
        (128, 0, 1, 1, None),
        (
            1024,
            128,
            8,
            2,
            "64 images a device and groups of 128: every normalisation communicates; use a "
            "batch of 2048 (or a multiple), or config.group_size 64",
        ),
        (
            512,
            128,
            8,
            1,
            "64 images a device and groups of 128: every normalisation communicates; use a "
            "batch of 1024 (or a multiple), or config.group_size 64",
        ),
        # A larger batch would be a larger group.
        (
            64,
            0,
            8,
            1,
            "8 images a device and groups of 64: every normalisation communicates; use "
            "config.group_size 8",
        ),
        (
            1536,
            128,
            8,
            1,
            "192 images a device and groups of 128: every normalisation communicates; "
            "use a batch of 1024 (or a multiple), or config.group_size 192",
        ),
    ],
)
def test_groups_that_span_devices_are_noticed(batch, group, devices, parts, message) -> None:
    assert parallel.spanning_groups(batch, group, devices, parts) == message
