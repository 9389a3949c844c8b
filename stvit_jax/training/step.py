"""The state of training, and the pure functions that change it: `train_step`, `eval_step`."""

from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from stvit_jax import parallel
from stvit_jax.data.normalization import normalize
from stvit_jax.models.stvit import STViT
from stvit_jax.schedules import Schedule
from stvit_jax.training import optimizer

Batch = dict[str, jax.Array]
Augment = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


@flax.struct.dataclass
class TrainState:
    """Everything that a run continues from; what is random is a function of the seed and `step`.

    `ema` holds the averages of `params` and `batch_stats`, or nothing where it is off.
    """

    step: jax.Array  # () int32: optimiser steps done, batches consumed
    params: Any
    batch_stats: Any
    opt_state: Any
    ema: Any

    @property
    def variables(self) -> dict[str, Any]:
        return {"params": self.params, "batch_stats": self.batch_stats}


def init_state(
    model: STViT, tx: optax.GradientTransformation, key: jax.Array, image_size: int, ema: bool
) -> TrainState:
    """The state before the first step; pure, for `jit` with output shardings or `eval_shape`."""
    images = jax.ShapeDtypeStruct((1, image_size, image_size, model.in_chans), jnp.float32)
    variables = model.lazy_init(key, images)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        opt_state=tx.init(variables["params"]),
        # A copy: two leaves of one donated state must not share a buffer.
        ema=jax.tree.map(jnp.copy, variables) if ema else {},
        **variables,
    )


def step_keys(seed: int, step: jax.Array | int) -> tuple[jax.Array, jax.Array]:
    """The keys of the augmentation and of drop path, for one step of a run."""
    augment_key, dropout_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), step))
    return augment_key, dropout_key


def make_train_step(
    model: STViT,
    tx: optax.GradientTransformation,
    *,
    seed: int,
    augment: Augment,
    drop_path: Schedule,
    ema_decay: float,
    freeze_batch_norm: bool,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """One optimiser step as a pure function.

    Args:
      model: the network.
      tx: the optimiser.
      seed: of the run; every step folds its number in.
      augment: (key, uint8 images, labels) to (network input, soft labels (B, K)).
      drop_path: rate by step.
      ema_decay: of the moving average; 0: none.
      freeze_batch_norm: the published fine-tuning: inference mode, while all parameters train.

    Returns:
      (state, batch of "image" uint8 (B, S, S, 3), "label" (B,) and "replaced" (B,)) to (state,
      {"loss", "unreadable": how many images did not decode}).
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        augment_key, dropout_key = step_keys(seed, state.step)
        images, targets = augment(augment_key, batch["image"], batch["label"])

        def loss_fn(params: Any) -> tuple[jax.Array, Any]:
            variables = {"params": params, "batch_stats": state.batch_stats}
            if freeze_batch_norm:
                logits, updated = model.apply(variables, images), {}
            else:
                logits, updated = model.apply(
                    variables,
                    images,
                    train=True,
                    drop_path_rate=drop_path(state.step),
                    mutable=["batch_stats"],
                    rngs={"dropout": dropout_key},
                )
            loss = jnp.mean(optax.softmax_cross_entropy(logits, targets))
            return loss, updated.get("batch_stats", state.batch_stats)

        (loss, batch_stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        state = state.replace(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            batch_stats=batch_stats,
            opt_state=opt_state,
        )
        if ema_decay:
            state = state.replace(
                ema=optimizer.update_average(state.ema, state.variables, ema_decay)
            )
        # The first readable image after a damaged one stands in for it.
        return state, {"loss": loss, "unreadable": jnp.sum(batch["replaced"] > 0)}

    return train_step


def make_eval_step(model: STViT) -> Callable[[Any, Batch], dict[str, jax.Array]]:
    """Sums over a batch, for exact evaluation.

    Returns:
      (variables, batch of "image", "label", "mask" False on padding, "readable" False where a
      stand-in replaces a damaged image) to the sums "count", "top1", "top5", "unreadable" and
      "loss" (over the readable). An unreadable image counts as wrong.
    """

    def eval_step(variables: Any, batch: Batch) -> dict[str, jax.Array]:
        logits = model.apply(variables, normalize(batch["image"]))
        valid = batch["mask"] & batch["readable"]
        _, best = jax.lax.top_k(logits, min(5, logits.shape[-1]))
        hits = (best == batch["label"][:, None]) & valid[:, None]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return {
            "count": jnp.sum(batch["mask"]),
            "unreadable": jnp.sum(batch["mask"] & ~batch["readable"]),
            "top1": jnp.sum(hits[:, 0]),
            "top5": jnp.sum(hits),
            "loss": jnp.sum(jnp.where(valid, losses, 0)),
        }

    return eval_step


def abstract_batch(batch_size: int, image_size: int, train: bool) -> dict[str, Any]:
    """Shapes and dtypes of what the loader gives, to compile before the first batch is there."""
    images = (batch_size, image_size, image_size, 3)
    extra = {"replaced": jnp.int32} if train else {"mask": jnp.bool_, "readable": jnp.bool_}
    return {
        "image": jax.ShapeDtypeStruct(images, jnp.uint8),
        "label": jax.ShapeDtypeStruct((batch_size,), jnp.int32),
        **{key: jax.ShapeDtypeStruct((batch_size,), dtype) for key, dtype in extra.items()},
    }


def compile_step(
    step: Callable, state: Any, batch: dict[str, Any], mesh: Mesh, *, donate: bool
) -> Callable:
    """Compiles a step (state, batch) ahead of its first call.

    The state is replicated (and its memory reused where `donate`), the batch split by image, the
    result replicated. `state` and `batch` may be abstract.
    """
    whole, split = parallel.replicated(mesh), parallel.by_image(mesh)
    jitted = jax.jit(
        step,
        in_shardings=(whole, split),
        out_shardings=whole,
        donate_argnums=0 if donate else (),
    )
    return jitted.lower(state, batch).compile()
