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
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from benchmarks import contest, flax_steps, model, torch_steps, trace
from benchmarks.case import Case, batch_of, variables_of
from benchmarks.limits import share_of_l1, utilisation
from benchmarks.timing import Contender, Seconds, alternate
from stvit_jax import torch_weights
from stvit_jax.errors import UserError
from stvit_jax.models.stvit import create_model
from tests.program import NARROW_SETTINGS, ROOT, one_core

# Four tokens in the last stage: one alone, of 32 pixels, gives its query and key no gradient.
CASE = Case("stvit_tiny", "train", 64, 4, "float32", drop_path=0.0)
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


@pytest.mark.docs
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


# In training `torch.compile` leaves the network as it is, in inference it finds no compiler: both
# are what a user may have, and take less time than compiling.
@pytest.mark.parametrize(
    "mode, environment",
    [
        pytest.param("train", "TORCHDYNAMO_DISABLE=1", marks=pytest.mark.slow),
        pytest.param("infer", "CXX=no-compiler", marks=pytest.mark.docs),
    ],
)
def test_the_command_without_tensorflow(mode: str, environment: str, tmp_path: Path) -> None:
    """All of it at its smallest, and one round."""
    for name in ("tensorflow", "tensorflow_datasets"):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('{name} is imported')\n")
    rows = tmp_path / "rows.json"
    command = [sys.executable, "-m", "benchmarks.model", "--models", "stvit_tiny"]
    command += ["--mode", mode, "--batch-size", "2", "--rounds", "1", "--json", str(rows)]
    command += ["--profile", str(tmp_path / "traces")]
    changed = {"PYTHONPATH": str(tmp_path)} | dict([environment.split("=")])
    with one_core():
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | changed, capture_output=True, text=True, timeout=600
        )
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(rows.read_text())
    assert row["model"] == "stvit_tiny" and row["mode"] == mode and row["device"] == "cpu"
    assert row["batch_size"] == 2 and row["image_size"] == 32 and row["dtype"] == "float32"
    assert row["cores"] == 1 and row["compile_seconds"] > 0 and row["first_step_seconds"] > 0
    assert row["ratio_eager"] == pytest.approx(row["ours"] / row["eager"])
    for unknown in ("mfu", "share_of_l1", "peak_memory"):
        assert row[unknown] is None
    if mode == "infer":
        assert row["compiled"] is None and row["ratio_compiled"] is None
        assert done.stderr.count("torch.compile (default) does not work here") == 1
    else:
        assert row["ratio_compiled"] == pytest.approx(row["ours"] / row["compiled"])
    assert "ratios are ours / theirs; medians of 1 rounds" in done.stdout
    assert len(list(tmp_path.glob("traces/stvit_tiny-*/**/*.xplane.pb"))) == 1
    assert re.search(r"^convolution +\d+ +[\d.]+ +[\d.]+%$", done.stdout, re.M)
    assert re.search(rf"^ +stvit_tiny +{mode} +[\d.]+ +[\d.]+ ", done.stdout, re.M)


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


def test_a_file_that_cannot_be_written_is_known_at_once(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        model.main(["--json", str(tmp_path / "nowhere" / "rows.json")])


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


def test_operations_are_named_after_what_is_in_them() -> None:
    program = """
HloModule jit_step

%fused_computation.1 (p: bf16[8,8]) -> bf16[8] {
  %dot.1 = bf16[8,8]{1,0} dot(%p, %p), lhs_contracting_dims={1}
  ROOT %reduce.1 = bf16[8]{0} reduce(%dot.1, %c), dimensions={1}, to_apply=%add
}

%fused_computation.2 (p.1: bf16[8]) -> bf16[8] {
  ROOT %add.9 = bf16[8]{0} add(%p.1, %p.1)
}

ENTRY %main.5 (x: bf16[8,8]) -> (bf16[8], s8[4]) {
  %x = bf16[8,8]{1,0} parameter(0)
  %one = bf16[8]{0} fusion(%x), kind=kInput, calls=%fused_computation.1
  %two.1 = (bf16[8]{0:T(8,128)}, f32[]) fusion(%one), kind=kLoop, calls=%fused_computation.2
  %three = (bf16[8]{0}, s8[4]{0}) custom-call(%x), custom_call_target="__cublas$gemm"
  %four = (s32[], bf16[8]) while(%t), condition=%c, body=%b
  ROOT %five = (bf16[8], s8[4]) tuple(%two.1, %three)
}
"""
    found = trace.kinds(program)
    assert [found[name] for name in ("one", "two.1", "three", "four", "x")] == [
        "fusion of dot",
        "fusion, pointwise",
        "custom-call __cublas$gemm",
        "while",
        "parameter",
    ]


def test_a_trace_tells_the_time_by_kind(tmp_path: Path) -> None:
    def chain(x: jax.Array) -> jax.Array:
        y = jax.lax.fori_loop(0, 5, lambda i, x: jnp.sin(x @ x), x)
        return y @ x

    x = jnp.ones((64, 64))
    compiled = jax.jit(chain).lower(x).compile()

    def work(times: int) -> None:
        for _ in range(times):
            compiled(x).block_until_ready()

    rows = trace.by_kind(trace.record(work, tmp_path), compiled.as_text())
    counts = {kind: count for kind, count, _ in rows}
    # A product is a library's call or a fusion, as the version of XLA has it.
    assert counts.get("dot", 0) + counts.get("fusion of dot", 0) == 5 + 1
    assert not {"while", "call", "unknown"} & counts.keys()
    assert all(seconds > 0 for _, _, seconds in rows)
    assert trace.table(rows)[0].split() == ["kind", "of", "operation", "a", "step", "ms", "share"]
    shares = [float(line.split()[-1].rstrip("%")) for line in trace.table(rows)[1:]]
    assert sum(shares) == pytest.approx(100, abs=1) and shares == sorted(shares, reverse=True)
