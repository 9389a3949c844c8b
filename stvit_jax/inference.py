"""A trained network as one function of pictures: what is predicted and exported."""

from collections.abc import Callable
from typing import Any

import jax

from stvit_jax.checkpoints.trained import Trained
from stvit_jax.data.normalization import normalize
from stvit_jax.errors import UserError
from stvit_jax.models.fold import fold_batch_norm
from stvit_jax.models.settings import backbone

Logits = Callable[[Any, jax.Array], jax.Array]


def network(trained: Trained) -> tuple[Logits, dict[str, Any]]:
    """The folded network, normalisation included.

    Returns:
      A function of variables and uint8 pictures, RGB, to logits, and its variables: of a
      classifier, crops (B, S, S, 3) to (B, K); of a segmenter, any (B, H, W, 3) to (B, H, W, K).

    Raises:
      UserError: it is a network of other pictures than RGB.
    """
    if (channels := backbone(trained.model).in_chans) != 3:
        raise UserError(
            f"{trained.source} is a network of {channels} channels, and pictures have 3: train one "
            "with model.in_chans 3"
        )
    model, variables = fold_batch_norm(trained.model, trained.variables)

    def logits(variables: Any, images: jax.Array) -> jax.Array:
        return model.apply(variables, normalize(images))

    return logits, variables
