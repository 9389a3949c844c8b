"""`benchmarks.ops`: all forms of an operation compute the same, and the command that times them."""

import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from benchmarks import op_forms, ops, torch_ops
from benchmarks.op_forms import OPS, stages_of
from stvit_jax.errors import UserError
from stvit_jax.models.stvit import create_model
from tests.program import ROOT, one_core

NETWORK = create_model(
    "stvit_tiny",
    embed_dim=(8, 12, 16, 16),
    num_heads=(1, 2, 2, 2),
    stoken_size=(4, 3, 1, 1),
    n_iter=(1, 2, 1, 1),
)


def channels_last(name: str, x: torch.Tensor) -> np.ndarray:
    """The inverse of `torch_ops.moved`."""
    axes = {"kernel": (2, 3, 1, 0), "x": (0, 2, 3, 1)}.get(name, range(x.ndim))
    return x.detach().permute(*axes).numpy()


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("op", OPS)
def test_all_forms_compute_the_same_values_and_gradients(op: str, number: int) -> None:
    stage = stages_of(NETWORK, 32, batch=2)[number - 1]
    arguments = ops.arguments_of(op, stage)
    values = [jnp.asarray(x) for x in arguments.values()]
    found = {}
    for form, function in OPS[op].forms.items():
        y = jax.eval_shape(op_forms.forward(function, stage), values, None)
        y, grads = jax.jit(op_forms.gradient(function, stage))(values, jnp.ones(y.shape))
        found[form] = [y, *grads]
    works = torch_ops.works(op, stage, arguments, torch.device("cpu"), narrow=False)
    y, grads = works["gradient"]()
    torch.testing.assert_close(works["forward"](), y.detach())
    result = "x" if "x" in arguments else "y"
    named = zip([result, *arguments], [y, *grads], strict=True)
    found["torch"] = [channels_last(name, x) for name, x in named]

    first = found.pop(next(iter(OPS[op].forms)))
    assert found
    for form, arrays in found.items():
        for name, a, b in zip([op, *arguments], arrays, first, strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5, err_msg=f"{form}: {name}")


def test_the_table_is_complete_and_stages_are_the_network_s() -> None:
    assert torch_ops.FORMS.keys() == OPS.keys()
    stages = stages_of(create_model("stvit_small"), 224, 8)
    assert [stage.side for stage in stages] == [56, 28, 14, 7]
    assert [OPS["gelu_depthwise"].shapes(stage)["x"][-1] for stage in stages] == [
        256,
        512,
        1280,
        2048,
    ]
    assert [OPS["super_tokens"].shapes(stage) is None for stage in stages] == [0, 0, 1, 1]
    assert [OPS["attention"].shapes(stage)["q"] for stage in stages] == [
        (8, 49, 1, 64),
        (8, 49, 2, 64),
        (8, 196, 5, 64),
        (8, 49, 8, 64),
    ]
    assert OPS["downsample"].shapes(stages[-1]) is None


@pytest.mark.docs
def test_the_command(tmp_path: Path) -> None:
    rows = tmp_path / "rows.json"
    command = [sys.executable, "-m", "benchmarks.ops", "--ops", "depthwise,downsample"]
    command += ["--model", "stvit_tiny", "--batch-size", "1", "--rounds", "1", "--json", str(rows)]
    with one_core():
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert re.search(
        r"^depthwise +1 1x8x8x32 +gradient +plain [\d.]+ ms, library [\d.]+ \([\d.]+\), torch ",
        done.stdout,
        re.M,
    )
    found = json.loads(rows.read_text())
    assert len(found) == 4 * 2 * 3 + 3 * 2 * 2  # stages, passes, forms
    for row in found:
        assert row["seconds"] > 0 and row["device"] == "cpu" and row["dtype"] == "float32"
        assert row["ratio"] == 1 or row["form"] != "plain"


def test_an_operation_that_is_not_there_is_named() -> None:
    with pytest.raises(UserError, match="--ops: unknown depthwisse; known: depthwise, gelu_"):
        ops.main(["--ops", "depthwisse"])
    with pytest.raises(UserError, match="invalid choice: 'stvit_tiny,stvit_small'"):
        ops.main(["--model", "stvit_tiny,stvit_small"])
