"""`benchmarks.model`: the command as people run it, equal work, and the arithmetic of its rows."""

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import torch

from benchmarks import contest, flax_steps, model, torch_steps
from benchmarks.case import Case, batch_of, variables_of
from benchmarks.limits import share_of_l1, utilisation
from benchmarks.timing import Contender, Seconds, alternate
from stvit_jax import torch_weights
from stvit_jax.errors import UserError
from stvit_jax.models.stvit import create_model
from tests.program import NARROW_SETTINGS, ROOT, one_core

CASE = Case("stvit_tiny", "train", 32, 4, "float32", drop_path=0.0)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def narrow():
    """A narrow network with layer scale, its variables and a batch."""
    scaled = {"layerscale": (False, False, True, True)}
    network = create_model("stvit_tiny", **NARROW_SETTINGS, **scaled)
    return network, variables_of(network), *batch_of(CASE, network)


@pytest.mark.parametrize("mode", ["infer", "train"])
def test_equal_work_is_found_equal_and_other_weights_are_not(mode, narrow) -> None:
    network, variables, images, targets = narrow
    peer = torch_steps.network(CASE, network, variables, CPU)
    ours = flax_steps.outputs(network, mode, variables, images, targets)
    assert ours.keys() == ({"logits"} if mode == "infer" else {"logits", "loss"})
    contest.check_equal_work(ours, torch_steps.outputs(peer, mode, images, targets))
    with torch.no_grad():
        peer.layers[2].blocks[0].mlp2.fc2.weight *= 1.01
    with pytest.raises(UserError, match="the logits of the two sides differ by .* nothing was"):
        contest.check_equal_work(ours, torch_steps.outputs(peer, mode, images, targets))


def test_a_training_step_learns_the_same_on_both_sides(narrow) -> None:
    """Learning rate, decay and statistics, from the weights and what they have become."""
    network, variables, images, targets = narrow
    case = dataclasses.replace(CASE, batch_size=4096)  # a learning rate that float32 shows
    peer = torch_steps.network(case, network, variables, CPU).train()
    step, arguments = flax_steps.program(case, network, variables, images, targets)
    state, metrics = jax.jit(step)(*arguments)
    theirs = torch_steps.training_step(case, peer, peer, torch.tensor(targets))
    loss = theirs(torch_steps.to_device(images, CPU))
    assert float(metrics["loss"]) == pytest.approx(loss.item(), rel=1e-5)

    after = torch_weights.to_torch(jax.device_get(state.variables))
    compared = 0
    for name, value in peer.state_dict().items():
        if "running_" in name:
            np.testing.assert_allclose(after[name], value, rtol=1e-4, atol=1e-5)
        elif value.ndim > 1 and "fold" not in name:
            # Adam's first step is the gradient's sign: of a gradient near zero it is noise.
            wrong = np.abs(after[name] - value.numpy()) > 0.002 * case.learning_rate
            assert wrong.mean() < 0.01, name
            compared += 1
    assert compared == 4 + 4 * 6 + 2 * 2 + 3 + 2  # stem, blocks, layer scale, downsampling, head


def test_the_command_without_tensorflow_and_without_a_compiler(tmp_path: Path) -> None:
    """All of it at its smallest: both modes, one round; torch.compile fails and is left out."""
    for name in ("tensorflow", "tensorflow_datasets"):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('{name} is imported')\n")
    rows = tmp_path / "rows.json"
    command = [sys.executable, "-m", "benchmarks.model", "--models", "stvit_tiny"]
    command += ["--batch-size", "2", "--rounds", "1", "--json", str(rows)]
    environment = {"PYTHONPATH": str(tmp_path), "CXX": str(tmp_path / "no-compiler")}
    with one_core():
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("torch.compile (default) does not work here") == 2
    found = json.loads(rows.read_text())
    assert [row["mode"] for row in found] == ["train", "infer"]
    for row in found:
        assert row["model"] == "stvit_tiny" and row["device"] == "cpu" and row["cores"] == 1
        assert row["batch_size"] == 2 and row["image_size"] == 32 and row["dtype"] == "float32"
        assert row["ours"] > 0 and row["eager"] > 0 and row["compile_seconds"] > 0
        assert row["ratio_eager"] == pytest.approx(row["ours"] / row["eager"])
        for unknown in ("compiled", "ratio_compiled", "mfu", "share_of_l1", "peak_memory"):
            assert row[unknown] is None
    assert "ratios are ours / theirs; medians of 1 rounds" in done.stdout
    assert re.search(r"^ +stvit_tiny +infer +[\d.]+ +[\d.]+ +- +[\d.]+ +-", done.stdout, re.M)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--models", "stvit_tiny,stvit_smal"], "--models: unknown stvit_smal; known: stvit_base"),
        (["--mode", "eval"], "--mode: unknown eval; known: train, infer"),
        (["--batch-size", "0"], "--batch-size is 0; it must be at least 1"),
        (["--dtype", "float16"], "invalid choice: 'float16'"),
    ],
)
def test_mistakes_are_named(arguments, message) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        model.main(arguments)


def test_pytorch_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    without = lambda name, *rest: None if name == "torch" else find(name, *rest)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", without)
    with pytest.raises(UserError, match="the peer needs PyTorch: pip install torch"):
        model.main([])


def test_what_is_said_of_an_h100() -> None:
    h100 = "NVIDIA H100 80GB HBM3"
    # 790 TFLOP/s; 2 FLOPs a MAC; training is three forward passes.
    assert utilisation(h100, "bfloat16", 10**9, "infer", 79_000) == pytest.approx(0.2)
    assert utilisation(h100, "bfloat16", 10**9, "train", 79_000) == pytest.approx(0.6)
    assert utilisation(h100, "float32", 10**9, "infer", 79_000) is None
    assert utilisation("cpu", "bfloat16", 10**9, "infer", 79_000) is None
    assert share_of_l1(h100, "bfloat16", "stvit_small", 224, "train", 5_450) == 0.5
    assert share_of_l1(h100, "bfloat16", "stvit_base", 384, "train", 5_450) is None
    assert share_of_l1(h100, "float32", "stvit_small", 224, "train", 5_450) is None
    assert share_of_l1("cpu", "bfloat16", "stvit_small", 224, "train", 5_450) is None


def test_the_better_of_the_compiled_forms_counts() -> None:
    names = ("ours", "eager", "default", "max-autotune")
    contenders = {
        name: Contender(lambda times: None, None, i, 10 * i) for i, name in enumerate(names)
    }
    found = dict(zip(names, map(Seconds, (2, 3, 1, 0.5), (4, 4, 8, 2)), strict=True))
    row = contest.row_of(CASE, contenders, found)
    assert (row["ours"], row["eager"], row["compiled"]) == (2, pytest.approx(4 / 3), 8)
    assert (row["ratio_eager"], row["ratio_compiled"]) == (1.5, 0.25)
    assert (row["cpu_ratio_eager"], row["cpu_ratio_compiled"]) == (1, 0.5)
    assert row["compiled_mode"] == "max-autotune" and row["compiled_peak_memory"] == 30
    head, line = model.table([row | {"peak_memory": 2_500_000}])
    assert head.split()[:5] == ["model", "mode", "ours", "eager", "compiled"]
    assert line.split()[:5] == ["stvit_tiny", "train", "2.0", "1.3", "8.0"] and line.endswith(" 2")


def test_contenders_take_turns_and_another_one_begins_every_round() -> None:
    turns: list[str] = []

    def sleeper(name: str, seconds: float):
        def work(times: int) -> None:
            turns.append(name)
            time.sleep(seconds * times)

        return work

    works = {"a": sleeper("a", 0.25), "b": sleeper("b", 0.35), "c": sleeper("c", 0.3)}
    found = alternate(works, 2, "sleeping")
    assert "".join(turns) == "abc" + "abc" + "bca"
    assert 0.25 <= found["a"].wall < 0.3 <= found["c"].wall and found["b"].cpu < 0.1
