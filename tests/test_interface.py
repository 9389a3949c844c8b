"""What users call by name is there after `import stvit_jax` alone."""

import subprocess
import sys

import stvit_jax
from tests.program import ROOT

NAMES = (
    *stvit_jax.__all__,
    "ops.resize.bilinear",
    "ops.resize.nearest",
    "data.eval_image",
    "data.normalize",
    "augment.apply_op",
    "schedules.learning_rate",
    "torch_weights.from_torch",
    "torch_weights.to_torch",
    "torch_weights.head_from_torch",
)
# What is imported for one name must not be what another lives on: each is read by a fork.
READ = """
import os, sys
import jax, stvit_jax
for name in sys.argv[1:]:
    if os.fork() == 0:
        eval(f"stvit_jax.{name}")
        os._exit(0)
    if os.wait()[1]:
        sys.exit(name)
"""


def test_every_name_is_there() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", READ, *NAMES],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
