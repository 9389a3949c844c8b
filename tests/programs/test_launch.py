"""launch/: scripts that are sound, commands that the program takes, and SLURM with a stand-in."""

import contextlib
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from stvit_jax import command_line
from tests.program import NARROW, ROOT, WITHOUT_TENSORFLOW, metrics

LAUNCH = ROOT / "launch"
FIRST_PORT = 2**16 - 2**12  # of those that JAX takes, by the job's number
# Starts the tasks of a step as srun does, and ends with the highest of their exit codes.
SRUN = """#!{python}
import os, subprocess, sys
count, command = int(os.environ["TASKS"]), sys.argv[1:]
while command[0].startswith("--"):
    command.pop(0)
step = {{"SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": str(count)}}
tasks = [
    subprocess.Popen(
        command,
        env=os.environ | step | {{"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)}},
    )
    for i in range(count)
]
with open(os.environ["PIDS"], "w") as file:
    print(*(task.pid for task in tasks), file=file)
sys.exit(max(task.wait() % 256 for task in tasks))
"""
SCONTROL = """#!/bin/sh
echo "$@" > "$REQUEUED"
"""


@pytest.mark.parametrize("script", sorted(LAUNCH.glob("*.sh")), ids=lambda path: path.name)
def test_scripts_are_sound(script: Path) -> None:
    checker = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert checker, "pip install -r requirements-test.txt"
    done = subprocess.run([checker, str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert os.access(script, os.X_OK)


@pytest.mark.parametrize("file", sorted(LAUNCH.iterdir()), ids=lambda path: path.name)
def test_commands_are_those_of_the_program(file: Path) -> None:
    text = file.read_text()
    text = text.replace("\\\n", " ").replace('\\"', '"')
    if file.suffix == ".yaml":
        command = yaml.safe_load(text)["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
        (container,) = command["spec"]["containers"]
        text = container["command"][-1]
    defaults = dict(re.findall(r"\$\{(\w+):=([^}]*)\}", text))
    defaults |= dict(re.findall(r'^(\w+)="?([^"\n(]+)"?$', text, re.MULTILINE))
    found = re.findall(r"train\.py (--config .*?--config\.data\.dir=\S+)", text, re.DOTALL)
    assert len(found) == 1
    words = found[0].replace('"', "")
    for _ in range(2):  # what stands for others, too
        words = re.sub(r"\$(\w+)", lambda m: defaults.get(m[1], f"/some/{m[1]}"), words)
    config, workdir, membership = command_line.train(shlex.split(words), "")
    assert config.model.name == "stvit_small" and membership is None
    assert str(config.data.dir).startswith("/") and str(workdir)


def free_job() -> int:
    """The number of a job whose port is free."""
    for job in random.sample(range(2**12), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", FIRST_PORT + job))
            return job
    raise AssertionError("no port is free")


JOB = free_job()


@pytest.fixture
def slurm(tmp_path, digits_dir):
    """Starts `launch/slurm.sh` with flags and a number of tasks."""
    programs = {"srun": SRUN.format(python=sys.executable), "scontrol": SCONTROL}
    (tmp_path / "bin").mkdir()
    for name, text in programs.items():
        path = tmp_path / "bin" / name
        path.write_text(text)
        path.chmod(0o755)
    own = f"{tmp_path / 'bin'}:{Path(sys.executable).parent}"
    environment = WITHOUT_TENSORFLOW | {
        "PATH": f"{own}:{os.environ['PATH']}",
        "CONFIG": "configs/digits.py",
        "DATA_DIR": str(digits_dir),
        "WORKDIR": str(tmp_path / "run"),
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1",  # see Processes of tests/program.py
        "PIDS": str(tmp_path / "pids"),
        "REQUEUED": str(tmp_path / "requeued"),
        "SLURM_JOB_ID": str(JOB),
        "USER": "somebody",
    }

    def start(tasks: int, *flags: str) -> subprocess.Popen:
        return subprocess.Popen(
            ["bash", str(LAUNCH / "slurm.sh"), *NARROW, "--config.data.workers=0", *flags],
            cwd=ROOT,
            env=os.environ | environment | {"TASKS": str(tasks)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return start


@pytest.mark.docs
def test_under_slurm_it_stops_is_put_back_and_continues(slurm, tmp_path) -> None:
    flags = ("--config.log_every=1", "--config.batch_size=64", "--config.steps=12")
    job = slurm(2, *flags, "--config.steps=5000", "--config.epochs=300")
    for line in job.stdout:
        if "step 3/" in line:
            break
    for pid in (tmp_path / "pids").read_text().split():
        os.kill(int(pid), signal.SIGUSR1)
    output = job.stdout.read()
    assert job.wait(120) == 75, output
    assert (tmp_path / "requeued").read_text().split() == ["requeue", str(JOB)]
    assert "stopped; back into the queue" in output
    (tmp_path / "requeued").unlink()
    deadline = time.monotonic() + 120
    step = max(int(path.name) for path in (tmp_path / "run/checkpoints").iterdir())
    more = ("--config.log_every=1", "--config.batch_size=64", "--config.epochs=300")
    job = slurm(2, *more, f"--config.steps={step + 2}")
    output, _ = job.communicate(timeout=max(1, deadline - time.monotonic()))
    assert job.returncode == 0, output
    assert "process 1 of 2: " in output and f"continuing after step {step}" in output
    assert not (tmp_path / "requeued").exists()
    assert metrics(tmp_path / "run")[-1]["step"] == step + 2
