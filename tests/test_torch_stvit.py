"""The PyTorch peer against numbers of the published code, and what the benchmarks rely on."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from benchmarks.torch_stvit import DropPath, STViT, adamw_groups, create_model
from tests.golden.golden_weights import images, weight
from tests.parity import assert_close, assert_gradients_close

DATA = Path(__file__).parent / "golden"

VARIANTS = ("stvit_small", "stvit_base", "stvit_large")
TINY = ("tiny", "tiny_iter")


def read_json(name: str) -> dict:
    return json.loads((DATA / name).read_text())


def state_keys(name: str) -> dict[str, list[int]]:
    return read_json(f"state_keys/{name}.json")


def build(name: str, **overrides) -> STViT:
    """The model that `state_keys/NAME.json` describes, randomly initialised."""
    if name in TINY:
        return create_model("stvit_small", **(read_json(f"{name}_config.json") | overrides))
    return create_model(name, **overrides)


def golden(name: str) -> tuple[STViT, np.lib.npyio.NpzFile]:
    """The float64 model with the golden weights, in inference mode, and the published numbers."""
    model = build(name).double().eval()
    state = {key: torch.as_tensor(weight(key, shape)) for key, shape in state_keys(name).items()}
    model.load_state_dict(state, strict=True)
    return model, np.load(DATA / f"{name}.npz")


def as_input(*args: int, **kwargs: int) -> torch.Tensor:
    return torch.from_numpy(images(*args, **kwargs))


def under(numbers: np.lib.npyio.NpzFile, prefix: str) -> dict[str, np.ndarray]:
    return {k.removeprefix(prefix): numbers[k] for k in numbers.files if k.startswith(prefix)}


def activations(model: STViT, inputs: torch.Tensor, pooled: bool) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        maps = model.feature_maps(inputs)
        features = model.pool(maps[-1])
        out = {"stem": model.patch_embed(inputs)}
        out |= {f"stage{i}": x for i, x in enumerate(maps, start=1)}
        if pooled:
            out = {name: x.mean(dim=(2, 3)) for name, x in out.items()}
        return out | {"features": features, "logits": model.head(features)}


@pytest.mark.parametrize("name", TINY + VARIANTS)
def test_state_dict_has_the_published_names_shapes_and_order(name):
    with torch.device("meta"):
        model = build(name)
    found = [(key, list(value.shape)) for key, value in model.state_dict().items()]
    assert found == list(state_keys(name).items())


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize(("height", "width"), [(64, 64), (72, 56)])
def test_inference_matches_the_published_code(name, height, width):
    model, numbers = golden(name)
    inputs = as_input(2, height, width)
    got, want = activations(model, inputs, pooled=False), under(numbers, f"{height}x{width}/")
    assert got.keys() == want.keys()
    assert_close(got, want)
    assert torch.equal(model(inputs), got["logits"])


@pytest.mark.parametrize("name", TINY)
def test_training_step_matches_the_published_code(name):
    model, numbers = golden(name)
    model.train()
    loss = F.cross_entropy(model(as_input(4, 64, 64, seed=1)), torch.arange(4))
    loss.backward()
    assert_close({"loss": loss.detach()}, {"loss": numbers["train/loss"]})

    gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
    assert gradients.keys() == under(numbers, "train/grad/").keys()
    assert_gradients_close(gradients, under(numbers, "train/grad/"))

    buffers = dict(model.named_buffers())
    running = {key: value for key, value in buffers.items() if ".running_" in f".{key}"}
    assert running.keys() == under(numbers, "train/buffer/").keys()
    assert_close(running, under(numbers, "train/buffer/"))
    for key in buffers.keys() - running.keys():
        kind = key.split(".")[-1]
        want = torch.tensor(1001) if kind == "num_batches_tracked" else weight(key, [9, 1, 3, 3])
        assert torch.equal(buffers[key], torch.as_tensor(want)), key


@pytest.mark.parametrize(
    "name",
    [
        "stvit_small",
        pytest.param("stvit_base", marks=pytest.mark.slow),
        pytest.param("stvit_large", marks=pytest.mark.slow),
    ],
)
def test_variants_match_the_published_code(name):
    model, numbers = golden(name)
    got, want = activations(model, as_input(2, 224, 224), pooled=True), under(numbers, "224x224/")
    assert got.keys() == want.keys()
    assert_close(got, want)


@pytest.mark.parametrize(
    ("name", "count"), list(zip(VARIANTS, (25_495_624, 51_691_288, 94_971_096), strict=True))
)
def test_parameters_and_adamw_groups_are_the_published_ones(name, count):
    with torch.device("meta"):
        model = build(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == count

    names = {parameter: key for key, parameter in model.named_parameters()}
    groups = adamw_groups(model, weight_decay=0.05)
    assert [group["weight_decay"] for group in groups] == [0.05, 0.0]
    for group, kind in zip(groups, ("decay", "no_decay"), strict=True):
        want = read_json("adamw_groups.json")[name][kind]
        assert len(group["params"]) == want["tensors"]
        assert sum(parameter.numel() for parameter in group["params"]) == want["elements"]
        if want["names"] is not None:
            assert sorted(names[parameter] for parameter in group["params"]) == sorted(
                want["names"]
            )


def test_initialisation():
    torch.manual_seed(0)
    model = build("tiny", init_values=1e-3, num_classes=2000)
    state = model.state_dict()
    for key, value in state.items():
        module, _, kind = key.rpartition(".")
        if kind in ("gamma_1", "gamma_2"):
            assert torch.equal(value, torch.full_like(value, 1e-3)), key
        elif kind in ("running_mean", "running_var"):
            assert torch.equal(value, torch.full_like(value, kind == "running_var")), key
        elif kind in ("weight", "bias") and state[f"{module}.weight"].ndim == 4:
            bound = state[f"{module}.weight"][0].numel() ** -0.5
            # Of n uniform draws the largest is below 0.5 * bound with probability 2**-n, n >= 8.
            assert 0.5 * bound < value.abs().max() <= bound, key
        elif kind in ("weight", "bias") and module != "head":
            assert torch.equal(value, torch.full_like(value, kind == "weight")), key
    assert state["head.weight"].std().item() == pytest.approx(0.02, rel=0.02)
    assert not state["head.bias"].any()


def test_overrides_by_the_published_names():
    model = build("tiny", in_chans=1, mlp_ratio=2, qkv_bias=False, projection=24, num_classes=3)
    shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
    assert shapes["patch_embed.proj.0.weight"] == [8, 1, 3, 3]
    assert shapes["layers.0.blocks.0.mlp2.fc1.weight"] == [32, 16, 1, 1]
    assert "layers.0.blocks.0.attn.stoken_refine.qkv.bias" not in shapes
    assert shapes["head.weight"] == [3, 24]
    assert model(torch.zeros(2, 1, 32, 32)).shape == (2, 3)
    with pytest.raises(TypeError, match="drop_rate"):
        create_model("stvit_small", drop_rate=0.1)


def test_drop_path_rates_grow_linearly_and_every_branch_draws_its_own_mask():
    torch.manual_seed(0)
    model = build("tiny", drop_path_rate=0.5)
    paths = [module for module in model.modules() if isinstance(module, DropPath)]
    assert [path.rate for path in paths] == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])

    masks = []  # in the order of the draws, two for each block

    def record(module, inputs, output):
        branch = inputs[0].detach().flatten(1)
        kept = output.detach().flatten(1).any(dim=1)
        torch.testing.assert_close(
            output.detach().flatten(1), branch * kept[:, None] / (1 - module.rate)
        )
        masks.append(kept)

    hooks = [path.register_forward_hook(record) for path in paths]
    inputs = torch.randn(64, 3, 32, 32)
    with torch.no_grad():
        model.train()(inputs)
    assert len(masks) == 12
    assert all(mask.all() for mask in masks[:2])  # rate 0
    for i, mask in enumerate(masks[2:], start=2):
        assert 0 < mask.sum() < 64
        assert not any(torch.equal(mask, other) for other in masks[:i])
    for path, hook in zip(paths, hooks, strict=True):
        hook.remove()
        assert path.eval()(inputs) is inputs


def test_bfloat16_autocast_keeps_the_residual_stream_narrow_and_channels_last():
    model = build("tiny", drop_path_rate=0.1).to(memory_format=torch.channels_last)
    inputs = torch.randn(2, 3, 72, 56).contiguous(memory_format=torch.channels_last)
    seen = []

    def record(module, _, output):
        seen.append((output.dtype, output.is_contiguous(memory_format=torch.channels_last)))

    for stage in model.layers:
        for block in stage.blocks:
            for module in (block, block.norm1, block.norm2, block.mlp2):
                module.register_forward_hook(record)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(inputs)
    F.cross_entropy(logits.float(), torch.tensor([0, 1])).backward()
    assert len(seen) == 24
    assert set(seen) == {(torch.bfloat16, True)}
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())


@pytest.mark.slow
def test_compiles_as_one_graph():
    """`fullgraph` raises at the first graph break."""
    model = build("tiny", depths=(1, 1, 1, 1), stoken_size=(8, 1, 1, 1), n_iter=(2, 1, 1, 1))
    model = model.double().train()
    inputs = as_input(2, 72, 56)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    results = []
    for run in (model, compiled):
        model.zero_grad()
        logits = run(inputs)
        logits.square().sum().backward()
        results.append([logits, *(parameter.grad.clone() for parameter in model.parameters())])
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-9)
