"""A trained network out of a file of any form, ready to be used."""

import dataclasses
from pathlib import Path
from typing import Any

from stvit_jax.checkpoints import fit, weights
from stvit_jax.checkpoints.pretrained import usual_size
from stvit_jax.errors import UserError
from stvit_jax.models.settings import Network, Settings, absent, create, is_segmenter


@dataclasses.dataclass(frozen=True)
class Trained:
    """A network, its variables, and what is known of how it is used.

    Attributes:
      model: for classification, or a segmenter; with the settings that the file carries, or those
        of the variant with its shapes.
      variables: `{"params": ..., "batch_stats": ...}`, `jax.Array`s in the dtypes of `model`.
      settings: plain values, as files carry them.
      classes: names by label, where the file carries them.
      image_size: side in pixels of the pictures that it was trained on; where the file does not say
        it, that of most released weights.
      source: the file or directory that was read.
    """

    model: Network
    variables: dict[str, Any]
    settings: Settings
    classes: tuple[str, ...] | None
    image_size: int
    source: Path

    @property
    def is_segmenter(self) -> bool:
        """Whether its classes are of pixels, not of pictures."""
        return "head" in self.settings


def load_trained(path: str | Path, ema: bool = False, **overrides: Any) -> Trained:
    """The network in a file of any form that `init_from` takes; its settings are found with it.

    Args:
      path: see `weights`.
      ema: the moving average in place of the raw weights.
      **overrides: of `create_model`, what is no part of the weights: `dtype`, `kernels`.

    Raises:
      UserError: as `weights.read`; or it carries no settings and no variant has its shapes; or the
        classifier is missing.
    """
    found = fit.identify(weights.read(path, ema))
    if not is_segmenter(found.variables) and (missing := absent(found.variables)):
        raise UserError(
            f"{found.source} has no {' and no '.join(missing)}, so there is nothing that it says "
            "of a picture: train it first, with --config.init_from of this file"
        )
    model = create(found.settings, **overrides)
    variables = fit.fitted(model, found)
    size = found.image_size or usual_size(found.settings)
    return Trained(model, variables, found.settings, found.classes, size, found.source)
