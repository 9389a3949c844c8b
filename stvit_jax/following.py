"""A config that leaves the network to the weights it starts from: their settings in its place.

`model.name` "" and `image_size` 0 mean: as `init_from` has it; of a segmenter the head comes with
the network. Once a run has begun, its own `config.json` says it, so that the weights may be gone;
others can be evaluated there all the same.
"""

import json
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from stvit_jax import cluster
from stvit_jax.checkpoints import fit
from stvit_jax.checkpoints.pretrained import usual_size
from stvit_jax.console import say
from stvit_jax.errors import UserError
from stvit_jax.evaluator import read_alike
from stvit_jax.models.settings import HEAD_SETTINGS, SETTINGS, described
from stvit_jax.training import workdir


def as_weights_have_it(config: ConfigDict, where: Path | None) -> ConfigDict:
    """The config with network and image size stated.

    Args:
      config: validated; it is not changed.
      where: the workdir, if there is one.

    Raises:
      UserError: they are to be those of weights, and none are named; or these cannot be read.
    """
    if config.model.name and config.image_size:
        return config
    with cluster.together():
        text = workdir.read_text(where / workdir.CONFIG) if where else None
        begun = where is not None and workdir.has_checkpoints(where)
    if begun and text and not (config.eval_only and config.init_from):
        try:
            before = json.loads(text)
            settings, size = before["model"], before["image_size"]
            head = before.get("segmentation", {})
            settings |= {k: head[k] for k in HEAD_SETTINGS if head.get(k) is not None}
        except (AttributeError, KeyError, TypeError, ValueError):
            raise UserError(f"{where / workdir.CONFIG} cannot be read: bring it back") from None
    elif config.init_from:
        found = fit.identify(read_alike(config.init_from, config.init_from_ema))
        settings, size = found.settings, found.image_size or usual_size(found.settings)
        say(f"{found.source} is of {described(settings)}, for images of {size} pixels")
    else:
        raise UserError(
            "config.init_from is empty, and the network is to be that of the weights: name some "
            "with --config.init_from=PATH, or the network with --config.model.name=stvit_small "
            "and --config.image_size=224"
        )
    return _stated(config, settings, size)


def _stated(config: ConfigDict, settings: dict[str, Any], size: int) -> ConfigDict:
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.image_size = config.image_size or size
        if not config.model.name:
            config.model.name = settings["name"]
            # Its kind has a default, which says nothing of what is wanted: theirs counts.
            config.segmentation.head = settings.get("head", config.segmentation.head)
            if config.segmentation.channels is None:
                config.segmentation.channels = settings.get("channels")
            for field in SETTINGS:
                # The classes are those of the data; what the command line states stays.
                value = settings.get(field)
                if field != "num_classes" and config.model[field] is None and value is not None:
                    config.model[field] = tuple(value) if isinstance(value, list) else value
    return config
