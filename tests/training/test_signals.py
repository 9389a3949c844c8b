"""Signals that ask to stop, in a process that never gets to look whether it was asked."""

import signal
import subprocess
import sys

import pytest

from stvit_jax.training import signals

PROGRAM = """
import sys, time
from stvit_jax.training import signals
stop = signals.install()
if "armed" in sys.argv:
    stop.arm()
print("ready", flush=True)
while True:
    time.sleep(1)
"""


def started(*arguments: str) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", signals.WATCHED)
def test_before_the_first_step_there_is_nothing_to_save(number: signal.Signals) -> None:
    process = started()
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == signals.STOPPED == 75
    assert said.startswith(f"{number.name}: stopped before the first step")


def test_a_second_signal_ends_at_once() -> None:
    """The first one sets a flag, at which this program never looks."""
    process = started("armed")
    process.send_signal(signal.SIGTERM)
    assert process.stderr.readline().startswith("SIGTERM: saving after this step")
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT and said.startswith("SIGINT again")
