"""Distillation: a trained network's answers are a part of what another learns.

The losses are those of DeiT (Touvron et al. 2021, arXiv:2012.12877). DeiT trains a distillation
token with them; STViT has none, so both losses are of the logits of its one head.

The teacher sees the student's augmented images, in inference, and whole batches: it is a part of
`prepare`, and nothing is differentiated there.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from stvit_jax.checkpoints import fit
from stvit_jax.checkpoints.weights import Weights
from stvit_jax.console import say
from stvit_jax.errors import UserError
from stvit_jax.models import fold, settings
from stvit_jax.models.stvit import STViT
from stvit_jax.training.task import Batch, Given, Tree, Variables

# (logits (B, K), a prepared batch) to (loss, scalars to log).
Criterion = Callable[[jax.Array, Batch], tuple[jax.Array, dict[str, jax.Array]]]
Prepare = Callable[[Batch, jax.Array], Batch]


def soft_loss(logits: jax.Array, teacher: jax.Array, temperature: float) -> jax.Array:
    """The divergence of the student's distribution from the teacher's.

    As DeiT has it, it is divided by the number of logits, not of examples.

    Args:
      logits: (B, K), the student's.
      teacher: (B, K), the teacher's.
      temperature: that both are divided by.
    """
    student = jax.nn.log_softmax(logits / temperature)
    aim = jax.nn.log_softmax(teacher / temperature)
    return jnp.sum(jnp.exp(aim) * (aim - student)) * temperature**2 / logits.size


def hard_loss(logits: jax.Array, teacher: jax.Array) -> jax.Array:
    """The cross-entropy against the teacher's best classes; arguments as of `soft_loss`."""
    best = jnp.argmax(teacher, axis=-1)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, best))


def criterion(teacher: ConfigDict, base: Criterion) -> Criterion:
    """The loss of a batch with `teacher` (B, K) logits in it: `alpha` of it is the teacher's.

    Args:
      teacher: `config.teacher`.
      base: the loss without a teacher.
    """
    kind, alpha, temperature = teacher.kind, teacher.alpha, teacher.temperature

    def loss(logits: jax.Array, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        own, scalars = base(logits, batch)
        if kind == "soft":
            distilled = soft_loss(logits, batch["teacher"], temperature)
        else:
            distilled = hard_loss(logits, batch["teacher"])
        total = own * (1 - alpha) + distilled * alpha
        return total, scalars | {"distillation_loss": distilled}

    return loss


def given(
    teacher: ConfigDict,
    student: STViT,
    classes: tuple[str, ...],
    prepare: Prepare,
    adopt: Callable[..., Variables],
) -> Given:
    """The teacher of a config, to be read when training begins.

    Args:
      teacher: `config.teacher`.
      student: whose dtype and kernels the teacher computes with.
      classes: of the data.
      prepare: of the student's task.
      adopt: as `classification.adopt`.
    """

    def use(found: Weights) -> tuple[Callable[[Batch, jax.Array, Tree], Batch], Tree]:
        found = fit.identify(found)
        _check(found, len(classes))
        model = settings.create(found.settings, dtype=student.dtype, kernels=student.kernels)
        variables: Any = adopt(model, classes, settings.abstract(model), found, True)
        variables = fold.folded_variables(model, variables)
        folded = model.clone(folded=True)

        def taught(batch: Batch, key: jax.Array, variables: Tree) -> Batch:
            prepared = prepare(batch, key)
            return prepared | {"teacher": folded.apply(variables, prepared["image"])}

        say(f"learning from {found.source} ({found.settings['name']}, {teacher.kind})")
        return taught, variables

    return Given(teacher.init_from, teacher.init_from_ema, use)


def _check(found: Weights, classes: int) -> None:
    """Raises UserError where these weights cannot say anything of the classes of the data."""
    if missing := settings.absent(found.variables):
        raise UserError(
            f"{found.source} has no {' and no '.join(missing)} and cannot be a teacher: train it "
            "first, with --config.init_from of this file"
        )
    if (theirs := found.settings["num_classes"]) != classes:
        raise UserError(
            f"{found.source} knows {theirs} classes and the data have {classes}: it cannot be "
            "their teacher; train one on these data, and name it with --config.teacher.init_from"
        )
