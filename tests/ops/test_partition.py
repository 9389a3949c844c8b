"""A call that a compiler cannot split, on eight devices: each gets its images, and no others."""

import subprocess
import sys

import pytest

from tests.program import ROOT

PROGRAM = """
import re, sys
from functools import partial
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from stvit_jax.ops import depthwise_tpu
from stvit_jax.ops.partition import by_image

mesh = Mesh(np.array(jax.devices()), ("data",))
split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
rng = np.random.default_rng(0)
images = int(sys.argv[1])
x, dy = (jnp.asarray(rng.normal(size=(images, 2, 3, 64)), jnp.bfloat16) for _ in range(2))
taps = jnp.asarray(rng.normal(size=(9, 64)), jnp.float32)


def gradient(x, dy, taps):
    dx, sums = depthwise_tpu.gelu_depthwise_gradient(x, taps, dy, gelu=True, interpret=True)
    return dx, sums[None]


def step(x, dy, taps):
    dx, sums = by_image(gradient, (True, True, False), mesh, x * 2, dy, taps)
    return dx, sums.sum(0)


program = jax.jit(step, in_shardings=(split, split, whole), out_shardings=(split, whole))
compiled = program.lower(x, dy, taps).compile()
dx, sums = compiled(*map(jax.device_put, (x, dy, taps), (split, split, whole)))
alone_dx, alone = gradient(x * 2, dy, taps)
np.testing.assert_array_equal(dx, alone_dx)
np.testing.assert_allclose(sums, alone.sum(0), rtol=1e-5, atol=1e-4)
text = compiled.as_text()
assert not re.search("all-gather|all-to-all|collective-permute", text), "images are moved"
print(len(re.findall(r" all-reduce(?:-start)?[(]", text)), "sums over devices")
"""


@pytest.mark.parametrize(
    "images", [24, *(pytest.param(n, marks=pytest.mark.slow) for n in (8, 128))]
)
def test_each_of_eight_devices_computes_its_own_images(images):
    environment = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(images)],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "HOME": "/nonexistent"} | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout == "1 sums over devices\n"
