"""Distillation: DeiT's losses, and a run that learns from a teacher."""

import re
import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stvit_jax.config import base
from stvit_jax.tasks import classification, distillation
from tests.program import STEPS, digests, values

ALPHA, TEMPERATURE = 0.3, 2.5


def teacher_config(**fields):
    config = base().teacher
    config.update(alpha=ALPHA, temperature=TEMPERATURE, **fields)
    return config


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_losses_and_gradients_are_deit_s(kind, x64):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(0, 3, (2, 6, 10))
    target = rng.dirichlet(np.ones(10), 6)
    criterion = distillation.criterion(teacher_config(kind=kind), classification.cross_entropy)
    batch = {"target": jnp.asarray(target), "teacher": jnp.asarray(teacher)}
    (loss, scalars), gradient = jax.value_and_grad(criterion, has_aux=True)(
        jnp.asarray(student), batch
    )

    functional = torch.nn.functional
    s = torch.tensor(student, requires_grad=True)
    t = torch.tensor(teacher)
    own = torch.sum(-torch.tensor(target) * functional.log_softmax(s, dim=-1), dim=-1).mean()
    if kind == "soft":
        distilled = (
            functional.kl_div(
                functional.log_softmax(s / TEMPERATURE, dim=1),
                functional.log_softmax(t / TEMPERATURE, dim=1),
                reduction="sum",
                log_target=True,
            )
            * (TEMPERATURE * TEMPERATURE)
            / s.numel()
        )
    else:
        distilled = functional.cross_entropy(s, t.argmax(dim=1))
    expected = own * (1 - ALPHA) + distilled * ALPHA
    expected.backward()
    assert abs(float(loss) - expected.item()) < 1e-10
    assert abs(float(scalars["distillation_loss"]) - distilled.item()) < 1e-10
    np.testing.assert_allclose(gradient, s.grad.numpy(), rtol=0, atol=1e-10)


@pytest.fixture(scope="module")
def flags(straight, tmp_path_factory):
    """Of a student of a teacher that no other test touches."""
    teacher = tmp_path_factory.mktemp("teacher") / "run"
    shutil.copytree(straight, teacher)
    return f"--config.teacher.init_from={teacher}", "--config.teacher.kind=soft"


@pytest.mark.slow
def test_a_student_goes_on_bit_by_bit_and_notices_another_teacher(start, flags, tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    program = start(whole, *flags)
    assert program.wait() == 0, program.output
    losses = values(whole, "train/distillation_loss")
    assert len(losses) == STEPS and all(0 < loss < 10 for loss in losses.values())

    program = start(stopped, *flags, "--config.steps=12")
    assert program.wait() == 0, program.output
    other = "--config.teacher.init_from_ema=True"
    record = stopped / "given.json"
    kept = record.read_text()
    record.write_text(kept.replace('"sha256": "', '"sha256": "0'))
    program = start(stopped, *flags)
    assert program.wait() != 0 and "has learned from" in program.output, program.output
    assert "Traceback" not in program.output
    record.write_text(kept)
    program = start(stopped, *flags, other)
    assert program.wait() != 0 and "another recipe" in program.output
    program = start(stopped, *flags)
    assert program.wait() == 0, program.output
    assert digests(stopped, STEPS) == digests(whole, STEPS)


@pytest.mark.slow
def test_parts_and_devices_learn_the_same(start, flags, tmp_path):
    """In float64: two networks that know little are alike, and their divergence is nearly 0."""
    steps = "--config.steps=3", "--config.group_size=8", "--config.ema_decay=0"
    steps += ("--config.dtype=float64",)
    runs = {
        "one": ((), 1),
        "eight": ((), 8),
        "parts": (("--config.gradient_accumulation=2", "--config.remat=(0,1)"), 2),
    }
    found = {}
    for name, (more, devices) in runs.items():
        program = start(tmp_path / name, *flags, *steps, *more, devices=devices)
        assert program.wait() == 0, program.output
        keys = ("train/distillation_loss", "train/loss")
        found[name] = [values(tmp_path / name, key) for key in keys]
        assert all(len(by_step) == 3 for by_step in found[name])
    for name in ("eight", "parts"):
        for theirs, ours in zip(found["one"], found[name], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-9), name


def test_a_teacher_of_no_use_is_one_line(start, tmp_path):
    damaged = tmp_path / "teacher.safetensors"
    damaged.write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    program = start(tmp_path / "run", f"--config.teacher.init_from={damaged}")
    assert program.wait() != 0
    assert "Traceback" not in program.output and str(damaged) in program.output.splitlines()[-1]


def taught(random_variables, names=None, classes=10):
    """What is given of a teacher of random weights, for data of the classes 0 to 9."""
    from stvit_jax.checkpoints.weights import Weights
    from stvit_jax.models import settings
    from tests.program import NARROW_SETTINGS

    stated = {"name": "stvit_tiny", "num_classes": classes, **NARROW_SETTINGS}
    model = settings.create({k: list(v) if type(v) is tuple else v for k, v in stated.items()})
    variables = random_variables(model)
    found = Weights(variables, stated, "teacher.pth", {}, classes=names)
    data = tuple(map(str, range(10)))
    given = distillation.given(
        teacher_config(init_from="teacher.pth"),
        model,
        data,
        lambda batch, key: {"image": batch["image"]},
        classification.adopt,
    )
    return partial(given.use, found), model, variables


@pytest.mark.docs
def test_the_teacher_is_no_constant_and_its_classes_are_put_in_order(random_variables):
    order = (3, 1, 2, 0, 4, 5, 6, 7, 8, 9)
    use, model, variables = taught(random_variables, tuple(map(str, order)))
    prepare, tree = use()
    images = jax.random.normal(jax.random.key(1), (2, 32, 32, 3))
    jitted = jax.jit(prepare)
    text = jitted.lower({"image": images}, jax.random.key(0), tree).as_text()
    sizes = [
        np.prod([int(n) for n in re.findall(r"(\d+)x", shape)], dtype=int)
        for shape in re.findall(r"stablehlo.constant dense<[^>]*> : tensor<([^>]*)>", text)
    ]
    assert max(sizes) < 1000
    logits = jitted({"image": images}, jax.random.key(0), tree)["teacher"]
    expected = model.apply(variables, images)[:, np.array(order)]
    np.testing.assert_allclose(logits, expected, atol=2e-5)


def test_other_classes_are_refused(random_variables):
    from stvit_jax.errors import UserError

    with pytest.raises(UserError, match="7 classes and the data have 10"):
        taught(random_variables, classes=7)[0]()
    with pytest.raises(UserError, match="other classes"):
        taught(random_variables, tuple("012345678x"))[0]()
