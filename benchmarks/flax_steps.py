"""Our side of a comparison: the project's own step, and the outputs that have to be the same."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.case import RECIPE, Case
from benchmarks.timing import Contender, seconds
from stvit_jax import parallel, schedules
from stvit_jax.models.settings import UNOPTIMIZED
from stvit_jax.models.stvit import STViT
from stvit_jax.tasks.classification import objective
from stvit_jax.training.gradients import at_once
from stvit_jax.training.optimizer import adamw
from stvit_jax.training.step import compile_step, init_state, make_train_step


def outputs(
    model: STViT, mode: str, variables: Any, images: np.ndarray, targets: np.ndarray
) -> dict[str, np.ndarray]:
    """Logits and, in training, the loss, without drop path; products in full float32."""

    def of(variables: Any, images: jax.Array, targets: jax.Array) -> dict[str, jax.Array]:
        if mode == "infer":
            return {"logits": model.apply(variables, images)}
        logits, _ = model.apply(
            variables, images, train=True, drop_path_rate=0.0, mutable=["batch_stats"]
        )
        batch = {"image": images, "target": targets, "row": jnp.arange(len(images))}
        loss, _ = objective(model, lambda step: 0.0, False)(
            variables["params"], variables["batch_stats"], batch, jax.random.key(0), 0
        )
        return {"logits": logits, "loss": loss}

    options = UNOPTIMIZED if jax.default_backend() == "cpu" else None
    with jax.default_matmul_precision("highest"):
        found = jax.jit(of, compiler_options=options)(variables, images, targets)
    return jax.tree.map(np.asarray, found)


def program(
    case: Case, model: STViT, variables: Any, images: np.ndarray, targets: np.ndarray
) -> tuple[Callable, list[Any]]:
    """The step, not compiled, and what it takes: first what training replaces."""
    if case.mode == "infer":
        return model.apply, [variables, images]
    tx = adamw(lambda step: case.learning_rate, RECIPE.weight_decay)
    step = make_train_step(
        lambda batch, key: batch,  # augmented already
        at_once(objective(model, schedules.by_epoch([case.drop_path], 1), False)),
        tx,
        RECIPE.ema_decay,
    )
    key = jax.random.key(0)
    state = init_state(lambda key: variables, tx, key, ema=True)
    unreadable = np.zeros(len(images), np.int32)
    return step, [state, {"image": images, "target": targets, "unreadable": unreadable}, key]


def contender(
    case: Case, model: STViT, variables: Any, images: np.ndarray, targets: np.ndarray
) -> Contender:
    """The compiled step on the first device, with everything that it takes lying there."""
    step, arguments = program(case, model, variables, images, targets)
    mesh = parallel.make_mesh(case.batch_size, devices=jax.devices()[:1])
    whole, split = parallel.replicated(mesh), parallel.by_image(mesh)
    shardings = [whole, split, whole][: len(arguments)]
    held, *rest = jax.device_put(arguments, shardings, may_alias=False)
    train = case.mode == "train"
    start = time.perf_counter()
    compiled = compile_step(step, held, *rest, mesh=mesh, donate=train)
    compile_seconds = time.perf_counter() - start

    def work(times: int) -> None:
        nonlocal held
        for _ in range(times):
            out = compiled(held, *rest)
            held = out[0] if train else held
        jax.block_until_ready(out)

    first_seconds = seconds(lambda: work(1))
    work(1)
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return Contender(work, compile_seconds, first_seconds, peak, compiled.as_text)
