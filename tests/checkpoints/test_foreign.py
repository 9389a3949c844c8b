"""Checkpoints that people have: other entries, wrapped names, plain data beside the weights."""

import argparse
import collections
import datetime
import decimal
import json
import pathlib
import random
import types
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.torch
import torch

from stvit_jax.checkpoints import fit, weights
from stvit_jax.errors import UserError
from stvit_jax.models.settings import create

State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def state(golden_state) -> State:
    return {
        name: torch.from_numpy(x.astype(np.float32) if x.ndim else x)
        for name, x in golden_state("tiny").items()
    }


@pytest.fixture(scope="module")
def average(state) -> State:
    return {name: x if "fold." in name else x + 1 for name, x in state.items()}


@pytest.fixture
def written(tmp_path) -> Callable[..., Path]:
    def write(held: Any, name: str = "w.pth", **options: Any) -> Path:
        torch.save(held, tmp_path / name, **options)
        return tmp_path / name

    return write


def assert_holds(found: weights.Weights, state: State) -> None:
    kernel = state["head.weight"].numpy().T
    np.testing.assert_array_equal(found.variables["params"]["head"]["kernel"], kernel)
    assert found.variables["batch_stats"]["norm"]["count"] == state["norm.num_batches_tracked"]


def prefixed(prefix: str, state: State) -> State:
    return {prefix + name: x for name, x in state.items()}


PREFIXES = (
    *("module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model.", "backbone."),
    *("model.backbone.", "module.model._orig_mod.backbone.", "encoder.net.", "model.model."),
)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_what_was_put_round_the_names_is_taken_off(prefix, state, written):
    found = weights.read(written({"state_dict": prefixed(prefix, state)}))
    assert_holds(found, state)
    assert found.notes == (f"taken off the names: {prefix}",)


def test_wrappers_inside_of_names_are_taken_off(state, written):
    inside = {name.replace("blocks.0.", "blocks.0._orig_mod."): x for name, x in state.items()}
    assert_holds(weights.read(written(inside)), state)
    with pytest.raises(UserError, match="two tensors in it are called"):
        weights.read(written(inside | state))


@pytest.mark.parametrize("entry", ["model", "state_dict", "model_state_dict", "net", "student"])
def test_entries_of_raw_weights(entry, state, written):
    found = weights.read(written({"epoch": 3, entry: state, "lr_scheduler": {"a": [1]}}))
    assert_holds(found, state)
    assert found.ignored.keys() >= {"epoch", "lr_scheduler"} and entry not in found.ignored


@pytest.mark.parametrize(
    "entry", ["model_ema", "state_dict_ema", "ema", "ema_state_dict", "swa_model", "averaged"]
)
def test_entries_of_the_moving_average(entry, state, average, written):
    path = written({"state_dict": state, entry: prefixed("module.", average)})
    assert_holds(weights.read(path), state)
    assert_holds(weights.read(path, ema=True), average)
    assert weights.read(path).ignored[entry] == "the moving average; taken with ema"
    path = written({entry: average})
    with pytest.raises(UserError, match=f"but a moving average, {entry}.*: take it with ema"):
        weights.read(path)


def test_entries_inside_of_entries_and_averages_behind_a_prefix(state, average, written):
    path = written({"model": state, "ema": {"decay": 0.99, "module": average, "updates": 7}})
    assert_holds(weights.read(path, ema=True), average)
    assert {"model", "ema.decay", "ema.updates"} <= weights.read(path, ema=True).ignored.keys()
    together = prefixed("model.", state) | prefixed("model_ema.module.", average)
    path = written({"state_dict": together | {"loss.weight": torch.ones(3)}})
    assert_holds(weights.read(path), state)
    assert_holds(weights.read(path, ema=True), average)
    ignored = weights.read(path).ignored
    assert ignored["state_dict.model_ema.*"] == "the moving average; taken with ema"
    assert ignored["1 tensors outside of model."] == "loss.weight"


def test_one_of_several_sets_has_to_be_stated(state, average, written):
    path = written({"student": state, "teacher": average})
    with pytest.raises(UserError, match="several sets of weights: student.*, teacher.*; save the"):
        weights.read(path)
    shared = written({"state_dict": state, "state_dict_ema": state})  # one object, held twice
    assert_holds(weights.read(shared, ema=True), state)


@pytest.mark.parametrize(
    "name",
    ["w.pt", "w.PTH", "w.bin", "w.Ckpt", "w.pth.tar", "w.model", "w", "w.safetensors"],
)
def test_the_contents_tell_what_a_file_is(name, state, written, tmp_path):
    assert_holds(weights.read(written(state, name)), state)
    (tmp_path / name).unlink()
    safetensors.torch.save_file(state, tmp_path / name)
    assert_holds(weights.read(tmp_path / name), state)


def test_counters_of_tools_are_ignored_by_name(state, written):
    more = {"n_averaged": torch.tensor(7), "total_ops": torch.zeros(1)}
    more |= {"layers.0.blocks.0.total_params": torch.zeros(1, dtype=torch.float64)}
    found = weights.read(written({"model": state | more}))
    assert_holds(found, state)
    assert {"*n_averaged", "*total_ops", "*total_params"} <= found.ignored.keys()


def test_missing_batch_counters_are_zero(state, written):
    older = {name: x for name, x in state.items() if not name.endswith("num_batches_tracked")}
    found = weights.read(written(older))
    assert_holds(found, state | {"norm.num_batches_tracked": 0})
    assert found.notes == ("14 num_batches_tracked are missing: taken for 0",)


def plain_data() -> dict[str, Any]:
    """What lies beside weights, by what it is an instance of."""
    return {
        "size": torch.Size([1, 2]),
        "device": torch.device("cuda:0"),
        "dtypes": [torch.float16, torch.bfloat16, torch.bool, torch.uint16],
        "layout": torch.strided,
        "version": torch.__version__,
        "paths": [pathlib.Path("a"), pathlib.PureWindowsPath("b")],
        "random states": (torch.get_rng_state(), random.getstate(), np.random.get_state()),
        "generator": np.random.default_rng(0).bit_generator.state,
        "tensors": [torch.tensor([True]), torch.ones(1, dtype=torch.uint8), torch.eye(2) * 1j],
        "sparse": torch.eye(2).to_sparse(),
        "arrays": [np.arange(3.0), np.array(["a"]), np.array([1, "a"], object), np.int16(3)],
        "sets": [{1, 2}, frozenset([1])],
        "defaultdict": collections.defaultdict(list, {"a": [1]}),
        "counter": collections.Counter("aab"),
        "deque": collections.deque([1, 2], 5),
        "bytes": [b"a", bytearray(b"a")],
        "numbers": [1j, 2**100, decimal.Decimal("1.5"), float("nan"), range(3), slice(1)],
        "times": [
            datetime.datetime.now(datetime.UTC),
            datetime.date(2025, 1, 1),
            datetime.time(1),
            datetime.timedelta(1),
        ],
        "uuid": uuid.UUID(int=1),
        "options": argparse.Namespace(lr=0.1, path=pathlib.Path("a"), dtype=torch.float16),
        "space": types.SimpleNamespace(a=1),
        "types": [int, np.float32, list],
        (1, 2): "a key that is a tuple",
        3: "a key that is a number",
    }


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_data_beside_the_weights_is_no_danger(protocol, state, written):
    held = {"model": state} | plain_data()
    found = weights.read(written(held, pickle_protocol=protocol))
    assert_holds(found, state)
    names = {"a tuple" if isinstance(k, tuple) else str(k) for k in plain_data()}
    assert names <= found.ignored.keys()


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_narrow_floats_are_widened_exactly(kind, state, written, tmp_path):
    narrow = {n: x.clamp(-4, 4).to(kind) if x.ndim else x for n, x in state.items()}
    wide = {name: x.float() if x.ndim else x for name, x in narrow.items()}
    assert_holds(weights.read(written(narrow)), wide)
    safetensors.torch.save_file(narrow, tmp_path / "w.safetensors")
    assert_holds(weights.read(tmp_path / "w.safetensors"), wide)


def test_folders_of_hubs(state, tmp_path, written):
    folder = tmp_path / "hub"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    torch.save(state, folder / "pytorch_model.bin")
    assert weights.read(folder).source == folder / "pytorch_model.bin"
    safetensors.torch.save_file(state, folder / "model.safetensors")
    assert weights.read(folder).source == folder / "model.safetensors"


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_shards_with_an_index(suffix, state, tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    names = list(state)
    parts = {f"part-{i}-of-3{suffix}": names[i::3] for i in range(3)}
    for file, held in parts.items():
        save = safetensors.torch.save_file if suffix == ".safetensors" else torch.save
        save({name: state[name] for name in held}, folder / file)
    stem = "model.safetensors" if suffix == ".safetensors" else "pytorch_model.bin"
    index = folder / f"{stem}.index.json"
    weight_map = {name: file for file, held in parts.items() for name in held}
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    for path in (folder, index):
        found = weights.read(path)
        assert_holds(found, state)
        assert found.source == index

    def said(changed: Any) -> str:
        index.write_text(changed if isinstance(changed, str) else json.dumps(changed))
        with pytest.raises(UserError) as caught:
            weights.read(folder)
        assert str(caught.value).isprintable() and len(str(caught.value)) < 500
        return str(caught.value)

    assert "lacks nothing.weight, which" in said(
        {"weight_map": weight_map | {"nothing.weight": f"part-0-of-3{suffix}"}}
    )
    assert "leads out of its folder, to ../w" in said({"weight_map": {"a": f"../w{suffix}"}})
    assert "leads out of its folder, to /etc/passwd" in said({"weight_map": {"a": "/etc/passwd"}})
    assert "cannot be read: No such file" in said({"weight_map": {"a": f"absent{suffix}"}})
    for text in ("{}", "[]", '{"weight_map": {"a": [1]}}'):
        assert "is no index of shards" in said(text)
    for text in ("", "{", "[" * 100_000):
        assert "is damaged, it cannot be read as JSON" in said(text)


TAILS = {"head": ("head",), "all after the stages": ("proj", "norm", "head")}


@pytest.mark.parametrize("tail", TAILS)
def test_what_is_missing_after_the_stages_is_initialised_anew(tail, state, written, capsys):
    modules = TAILS[tail]
    missing = tuple(f"{module}." for module in modules)
    backbone = {name: x for name, x in state.items() if not name.startswith(missing)}
    path = written({"model": backbone, "stvit_config": settings(num_classes=7)})
    found = weights.read(path)
    assert not set(modules) & found.variables["params"].keys()
    found = fit.identify(found)
    whole = fit.fill(found)
    assert whole.notes == (
        f"{', '.join(modules)} {'is' if len(modules) == 1 else 'are'} not in "
        "it: initialised anew, to be trained",
    )
    assert whole.variables["params"]["head"]["kernel"].shape == (64, 7)
    assert fit.fill(whole) is whole

    model = create(found.settings)
    variables = fit.load_weights(model, path)
    assert "re-initialised, to be trained" in capsys.readouterr().out
    assert fit.has_other_head(variables, found)
    for ours, theirs in zip(
        jax.tree.leaves(variables), jax.tree.leaves(whole.variables), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
    kernel = np.asarray(variables["params"]["head"]["kernel"])
    assert kernel.shape == (64, 7) and 0.01 < kernel.std() < 0.03
    weights.write(path.parent / "whole.pth", whole)
    assert fit.fill(fit.identify(weights.read(path.parent / "whole.pth"))).notes == ()


def test_half_a_head_is_missing_and_said(state, written):
    with pytest.raises(UserError, match="missing: head.bias"):
        weights.read(written({name: x for name, x in state.items() if name != "head.bias"}))


def settings(**changes: Any) -> dict[str, Any]:
    text = (Path(__file__).parents[1] / "golden" / "tiny_config.json").read_text()
    rest = {k: v for k, v in json.loads(text).items() if k not in ("init_values", "drop_path_rate")}
    return {"name": "stvit_small"} | rest | changes
