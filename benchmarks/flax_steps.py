"""Our side of a comparison: the project's own step, and the outputs that have to be the same."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.case import DROP_PATH, RECIPE, Case
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


def contender(
    case: Case, model: STViT, variables: Any, images: np.ndarray, targets: np.ndarray
) -> Contender:
    """The compiled step on the first device, with everything that it takes lying there."""
    mesh = parallel.make_mesh(case.batch_size, devices=jax.devices()[:1])
    if case.mode == "infer":
        arguments = [variables, images]
        step = model.apply
    else:
        rate = schedules.by_epoch([DROP_PATH], 1)
        tx = adamw(lambda step: case.learning_rate, RECIPE.weight_decay)
        step = make_train_step(
            lambda batch, key: batch,  # augmented already
            at_once(objective(model, rate, False)),
            tx,
            RECIPE.ema_decay,
        )
        state = init_state(lambda key: variables, tx, jax.random.key(0), ema=True)
        readable = np.zeros(len(images), np.int32)
        batch = {"image": images, "target": targets, "unreadable": readable}
        arguments = [state, batch, jax.random.key(0)]
    whole, split = parallel.replicated(mesh), parallel.by_image(mesh)
    shardings = (whole, split, whole)[: len(arguments)]
    held, *rest = jax.device_put(arguments, list(shardings), may_alias=False)
    train = case.mode == "train"

    def compile_it() -> None:
        nonlocal compiled
        compiled = compile_step(step, held, *rest, mesh=mesh, donate=train)

    def work(times: int) -> None:
        nonlocal held
        for _ in range(times):
            out = compiled(held, *rest)
            held = out[0] if train else held
        jax.block_until_ready(out)

    compiled: Any = None
    compile_seconds = seconds(compile_it)
    first_seconds = seconds(lambda: work(1))
    work(1)
    memory = jax.devices()[0].memory_stats() or {}
    return Contender(work, compile_seconds, first_seconds, memory.get("peak_bytes_in_use"))
