"""Weights of segmenters in every form, between heads, and from and for classification."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import convert_torch_weights
import stvit_jax
from benchmarks import torch_segmenter
from stvit_jax import torch_weights
from stvit_jax.checkpoints import fit, weights
from stvit_jax.checkpoints.manager import Checkpoints
from stvit_jax.checkpoints.trained import load_trained
from stvit_jax.errors import UserError
from stvit_jax.models import fold, settings
from stvit_jax.models.segmenter import KINDS
from stvit_jax.tasks import classification
from stvit_jax.trees import leaves
from tests.checkpoints.networks import FORMS, assert_bits_equal
from tests.parity import assert_close

STAGES = dict(
    embed_dim=(8, 16, 24, 32),
    depths=(1, 1, 1, 1),
    num_heads=(1, 2, 3, 4),
    stoken_size=(4, 2, 1, 1),
    layerscale=(False, False, True, True),
    projection=48,
)
CLASSES = ("wall", "floor", "sky", "café", "door")
NORMS = tuple(f"norm_{i}" for i in range(4))


def network(kind="upernet", **how):
    return stvit_jax.create_segmenter(kind, "stvit_small", **STAGES | {"channels": 16} | how)


@pytest.fixture(scope="module")
def made(random_variables):
    """Weights of a segmenter, by its settings; numpy, with settings and class names."""
    known = {}

    def make(kind="upernet", num_classes=5, channels=16):
        key = (kind, num_classes, channels)
        if key not in known:
            model = network(kind, num_classes=num_classes, channels=channels)
            variables = jax.tree.map(
                lambda x: np.asarray(x, np.int64 if x.ndim == 0 else x.dtype),
                random_variables(model),
            )
            named = CLASSES if num_classes == 5 else None
            own = settings.of(model, "stvit_small")
            known[key] = weights.Weights(variables, own, Path("made"), {}, classes=named)
        return known[key]

    return make


@pytest.fixture(scope="module")
def classifier(random_variables):
    model = stvit_jax.create_model("stvit_small", num_classes=7, **STAGES)
    own = settings.of(model, "stvit_small")
    variables = jax.tree.map(np.asarray, random_variables(model))
    return model, weights.Weights(variables, own, Path("classifier"), {})


def module(variables, *names):
    """The leaves of some modules, `params/decode_head/...`, by their paths."""
    return {
        path: np.asarray(x)
        for path, x in leaves(variables).items()
        if path.split("/", 1)[1].startswith(tuple(f"{name}/" for name in names))
    }


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys() and ours
    for path, x in ours.items():
        np.testing.assert_array_equal(x, theirs[path], err_msg=path)


@pytest.mark.parametrize("kind", ["upernet", "fpn"])
def test_every_form_keeps_every_bit(kind, made, tmp_path):
    found = dataclasses.replace(made(kind), image_size=64)
    for form in FORMS.values():
        weights.write(tmp_path / "there" / form, found)
        found = weights.read(tmp_path / "there" / form)
        assert_bits_equal(found.variables, made(kind).variables)
        assert (found.settings, found.classes) == (made(kind).settings, CLASSES)
    assert (found.settings["head"], found.settings["channels"], found.image_size) == (kind, 16, 64)
    assert fit.identify(found).settings == found.settings
    assert settings.create(found.settings) == network(kind, num_classes=5)
    state = torch.load(tmp_path / "there" / FORMS["pth"], weights_only=True)["model"]
    how = {k: v for k, v in found.settings.items() if k not in ("name", "head")}
    peer = torch_segmenter.create_segmenter(kind, "stvit_small", **how)
    peer.load_state_dict(state, strict=True)
    wrong = dataclasses.replace(found, classes=CLASSES[:4])
    weights.write(tmp_path / "four.pth", wrong)
    assert "class_names" in weights.read(tmp_path / "four.pth").ignored


def test_a_shared_folder_and_what_is_known_of_it(made, tmp_path, capsys):
    model, path = network("fpn", num_classes=5), tmp_path / "shared"
    stvit_jax.save_pretrained(path, model, made("fpn").variables, classes=CLASSES)
    back, held = stvit_jax.from_pretrained(path)
    assert back == model
    expected = made("fpn").variables
    assert_same(module(held, "backbone", *NORMS), module(expected, "backbone", *NORMS))
    config = json.loads((path / "config.json").read_text())
    own, cfg = config["stvit_config"], config["pretrained_cfg"]
    assert (own["head"], own["channels"], own["num_classes"]) == ("fpn", 16, 5)
    assert config["label_names"] == list(CLASSES) and cfg["input_size"] == [3, 512, 512]
    assert cfg["classifier"] == "decode_head.conv_seg" and "crop_pct" not in cfg
    found = load_trained(path, dtype=jnp.bfloat16)
    assert (found.model, found.classes, found.image_size) == (
        network("fpn", num_classes=5, dtype=jnp.bfloat16),
        CLASSES,
        512,
    )
    maps, held = stvit_jax.from_pretrained(path, features_only=True)
    assert maps == stvit_jax.create_model(
        "stvit_small", features_only=True, num_classes=5, **STAGES
    )
    backbone = {name: tree["backbone"] for name, tree in made("fpn").variables.items()}
    assert_same(leaves(jax.tree.map(np.asarray, held)), leaves(backbone))
    said = capsys.readouterr().out
    assert f"its decode_head, {', '.join(NORMS)} are dropped; this network has none" in said


def test_the_workdir_of_a_run(made, tmp_path):
    """Its config need not say the head: the shapes do."""
    path, variables = tmp_path / "run", made("fpn").variables
    (path / "checkpoints").mkdir(parents=True)
    model = {"name": "stvit_small", "num_classes": None} | STAGES
    (path / "config.json").write_text(
        json.dumps({"task": "segmentation", "image_size": 64, "model": model})
    )
    (path / "classes.json").write_text(json.dumps(CLASSES))
    on_device = jax.tree.map(
        lambda x: jnp.asarray(x, np.float32 if x.ndim else np.int32), variables
    )
    checkpoints = Checkpoints(path / "checkpoints", keep=1)
    checkpoints.save(3, {"step": jnp.int32(3), **on_device})
    checkpoints.close()
    found = fit.identify(weights.read(path))
    assert_bits_equal(found.variables, variables)
    assert (found.settings, found.classes, found.image_size) == (made("fpn").settings, CLASSES, 64)
    pth = tmp_path / "scenes.pth"
    assert convert_torch_weights.main([str(path), "--output", str(pth)]) == 0
    found = weights.read(pth)
    assert_bits_equal(found.variables, variables)
    assert (found.settings, found.classes, found.image_size) == (made("fpn").settings, CLASSES, 64)


def test_a_file_of_others(made, tmp_path, capsys):
    """No settings, entries beside the weights, wrapped names, no counters."""
    state = torch_weights.to_torch(made("fpn").variables)
    held = {
        f"module.{name}": torch.from_numpy(x.copy())
        for name, x in state.items()
        if not name.endswith("num_batches_tracked")
    }
    path = tmp_path / "iter_160000.pth"
    torch.save({"meta": {"iter": 160000}, "state_dict": held, "optimizer": {}}, path)
    args = [str(path), "--output", str(tmp_path / "w")]
    with pytest.raises(UserError, match="no variant has these shapes.*--head=fpn --channels=16"):
        convert_torch_weights.main(args)
    flags = [
        f"--{field}={','.join(map(str, value)) if isinstance(value, tuple) else value}"
        for field, value in STAGES.items()
    ]
    assert convert_torch_weights.main([*args, "--verify", "--model", "stvit_small", *flags]) == 0
    said = capsys.readouterr().out
    assert "found      fpn of 16 channels on stvit_small, 5 classes" in said
    assert "ignored  meta: not weights" in said and "largest difference" in said
    assert "num_batches_tracked are missing" in said and "taken off the names: module.\n" in said
    found = weights.read(tmp_path / "w")
    assert found.settings == made("fpn").settings
    wanted = jax.tree.map(lambda x: x if x.ndim else x * 0, made("fpn").variables)
    assert_bits_equal(found.variables, wanted)
    for wrong in (["--head=upernet"], ["--channels=8"]):
        with pytest.raises(UserError, match=f"not stvit_small: {wrong[0][2:].split('=')[0]} is "):
            convert_torch_weights.main([*args[:2], "x", "--model", "stvit_small", *flags, *wrong])


def test_a_published_variant_is_recognised(random_variables):
    model = stvit_jax.create_segmenter("fpn", "stvit_tiny", num_classes=3)
    shapes = settings.abstract(model)
    assert settings.complete(shapes, None) == settings.of(model, "stvit_tiny")


@pytest.mark.parametrize("prefix", ["", "model."])
def test_what_is_missing_or_too_much_is_listed(prefix, made, tmp_path):
    state = torch_weights.to_torch(made("upernet").variables)
    state["backbone.head.bias"] = state.pop("auxiliary_head.convs.0.bn.bias")
    held = {prefix + name: torch.from_numpy(x.copy()) for name, x in state.items()}
    torch.save({"state_dict": held}, tmp_path / "w.pth")
    with pytest.raises(UserError) as caught:
        weights.read(tmp_path / "w.pth")
    lists = "unexpected: backbone.head.bias; missing: auxiliary_head.convs.0.bn.bias"
    assert lists in str(caught.value)


def test_verify_notices_a_changed_weight(made):
    """Of the auxiliary head, which is run, too; by no more than the change all else differs."""
    before = made("upernet")
    variables = jax.tree.map(np.copy, before.variables)
    variables["params"]["auxiliary_head"]["conv_seg"]["bias"][2] += 1e-3
    after = dataclasses.replace(before, variables=variables)
    with pytest.raises(UserError, match="largest difference 1.0e-03, .*: they do not agree"):
        convert_torch_weights.compare(before, after)


def test_between_segmenters(made, tmp_path, capsys):
    """The same; other classes; another width; another head; and what no line can mend."""
    theirs = made("upernet")
    weights.write(tmp_path / "w.pth", theirs)
    before = ("backbone", *NORMS)

    def loaded(load=fit.fitted, **how):
        variables = load(network(**how), theirs)
        assert_same(module(variables, *before), module(theirs.variables, *before))
        return variables, capsys.readouterr().out

    def merged(model, found):
        zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), settings.abstract(model))
        return fit.merge(zeros, found)

    variables, said = loaded(num_classes=5)
    assert said == ""
    assert_same(module(variables, *settings.HEADS), module(theirs.variables, *settings.HEADS))

    variables, said = loaded(num_classes=3)
    assert "its head has 5 classes, this network 3; conv_seg is re-initialised" in said
    for head in settings.HEADS:
        own = module(variables, head)
        kernel = own.pop(f"params/{head}/conv_seg/kernel")
        assert kernel.shape[-1] == 3 and 0.005 < kernel.std() < 0.02
        assert not own.pop(f"params/{head}/conv_seg/bias").any()
        rest = module(theirs.variables, head)
        assert_same(own, {path: x for path, x in rest.items() if "conv_seg" not in path})

    variables, said = loaded(merged, num_classes=5, channels=8)
    assert "its head is upernet of 16 channels, that of this network upernet of 8; the" in said
    assert not any(x.any() for x in module(variables, *settings.HEADS).values())
    variables, said = loaded(merged, kind="fpn", num_classes=5)
    assert "upernet of 16 channels, that of this network fpn of 16; the head is re-init" in said
    assert set(variables["params"]) == {*before, "decode_head"}

    other = network(num_classes=5, layerscale=(False,) * 4)
    with pytest.raises(UserError, match="unexpected: params/backbone/layers_2/blocks_0/gamma_1"):
        stvit_jax.load_weights(other, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"has num_heads \(1, 2, 3, 4\), this network"):
        stvit_jax.load_weights(network(num_heads=(1, 2, 3, 8)), tmp_path / "w.pth")


def test_from_classification(classifier, capsys):
    """Whatever its super tokens: no weight depends on them, and dense tasks may want others."""
    model, theirs = classifier
    segmenter = network("upernet", num_classes=5, stoken_size=(8, 4, 2, 1))
    assert segmenter.backbone.stoken_size != model.stoken_size
    variables = fit.fitted(segmenter, theirs)
    said = capsys.readouterr().out
    assert "classifier: its proj, norm, head are dropped; this network has none\n" in said
    anew = f"{', '.join(NORMS)}, decode_head, auxiliary_head are not in it; re-initialised"
    assert anew in said
    inside = {name: {"backbone": tree} for name, tree in theirs.variables.items()}
    stages = module(inside, "backbone/patch_embed", *(f"backbone/layers_{i}" for i in range(4)))
    assert_same(module(variables, "backbone"), stages)
    assert (np.asarray(variables["params"]["norm_1"]["scale"]) == 1).all()
    assert fit.has_other_head(variables, theirs)
    without = settings.without(theirs.variables, ("proj", "norm", "head"))
    fit.merge(settings.abstract(segmenter), dataclasses.replace(theirs, variables=without))
    assert "dropped" not in capsys.readouterr().out


def test_for_classification(classifier, made, capsys):
    model, _ = classifier
    theirs = made("upernet")
    variables = fit.fitted(model, theirs)
    said = capsys.readouterr().out
    assert "decode_head" in said and "are dropped; this network has none" in said
    assert "proj, norm, head are not in it; re-initialised, to be trained" in said
    backbone = {name: tree["backbone"] for name, tree in theirs.variables.items()}
    stages = ("patch_embed", *(f"layers_{i}" for i in range(4)))
    assert_same(module(variables, *stages), leaves(backbone))
    # Pixels' classes are not those of pictures, whatever they are called.
    named = ("door", *CLASSES[:4])
    five = settings.abstract(model.clone(num_classes=5))
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), five)
    merged = classification.adopt(model, named, zeros, theirs, False)
    assert not merged["params"]["head"]["kernel"].any()
    assert "order" not in capsys.readouterr().out
    with pytest.raises(UserError, match="has no proj and no norm and no head, so there is nothing"):
        classification.adopt(model, named, five, theirs, True)


@pytest.mark.parametrize("kind", ["upernet", "fpn"])
def test_folded_it_gives_the_same(kind, made, x64):
    """Its backbone is that of a folded network, its head computes what the head did."""
    model = network(kind, num_classes=5, dtype=jnp.float64)
    variables = jax.tree.map(lambda x: x.astype(np.float64) if x.ndim else x, made(kind).variables)
    folded, fewer = stvit_jax.fold_batch_norm(model, variables)
    assert folded.folded and folded == fold.fitting(model, fewer)
    assert model == fold.fitting(folded, variables)
    assert jax.tree.map(np.shape, fewer) == jax.tree.map(np.shape, settings.abstract(folded))
    assert set(fewer["params"]) == {"backbone", "decode_head", *NORMS}
    assert not any("/bn/" in path for path in leaves(fewer))
    assert_same(module(fewer, *NORMS), module(variables, *NORMS))
    alone = {name: tree["backbone"] for name, tree in variables.items()}
    alone = fold.folded_variables(model.backbone.clone(features_only=True), alone)
    assert_same(
        module(fewer, "backbone"), module({"params": {"backbone": alone["params"]}}, "backbone")
    )

    rng = np.random.default_rng(0)
    maps = [rng.normal(size=(2, 16 >> i, 12 >> i, c)) for i, c in enumerate(STAGES["embed_dim"])]
    logits = []
    for net, held in ((model, variables), (folded, fewer)):
        head = KINDS[kind][1](16, num_classes=5, dtype=jnp.float64, folded=net.folded)
        own = {name: tree["decode_head"] for name, tree in held.items()}
        logits.append({"logits": jax.jit(head.apply)(own, maps)})
    assert_close(logits[1], logits[0], 1e-9)
    with pytest.raises(UserError, match="not those of a folded network"):
        folded.apply(variables, np.zeros((1, 32, 32, 3)))
    with pytest.raises(UserError, match="fold both"):
        stvit_jax.load_weights(folded, "w.pth")
