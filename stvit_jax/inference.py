"""A trained classifier as one function of pictures: what is predicted and exported."""

from collections.abc import Callable
from typing import Any

import jax

from stvit_jax.checkpoints.trained import Trained
from stvit_jax.data.normalization import normalize
from stvit_jax.errors import UserError
from stvit_jax.models.fold import fold_batch_norm

Logits = Callable[[Any, jax.Array], jax.Array]


def classifier(trained: Trained) -> tuple[Logits, dict[str, Any]]:
    """The folded network, normalisation included.

    Returns:
      A function of variables and uint8 crops (B, S, S, 3), RGB, to logits (B, num_classes); and its
      variables.

    Raises:
      UserError: it is a network of other pictures than RGB, or a segmenter.
    """
    if "head" in trained.settings:
        raise UserError(
            f"{trained.source} is of a segmenter, which has classes of pixels, not of pictures: "
            "from Python, stvit_jax.from_pretrained loads it"
        )
    if trained.model.in_chans != 3:
        raise UserError(
            f"{trained.source} is a network of {trained.model.in_chans} channels, and pictures "
            "have 3: train one with model.in_chans 3"
        )
    model, variables = fold_batch_norm(trained.model, trained.variables)

    def logits(variables: Any, images: jax.Array) -> jax.Array:
        return model.apply(variables, normalize(images))

    return logits, variables
