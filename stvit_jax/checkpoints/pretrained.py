"""A trained network as a folder to be shared, which PyTorch and JAX both load.

`model.safetensors` has PyTorch's names, for `load_state_dict(..., strict=True)`, and the settings
in its metadata, as `weights` writes it. `config.json` says `architecture`, `num_classes`,
`label_names` and `pretrained_cfg` as timm does; `stvit_config`, the settings, and `image_size`. A
segmenter has mmsegmentation's names, and nothing of what timm says of pooling and cropping.
"""

import contextlib
import json
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from stvit_jax import places, torch_weights
from stvit_jax.checkpoints import files, fit, hub, weights
from stvit_jax.data.decode import SMALL_SIZE, crop_share
from stvit_jax.data.normalization import MEAN, STD
from stvit_jax.errors import UserError, kind_of, listing, reason
from stvit_jax.models import settings
from stvit_jax.models.settings import Network, Settings, abstract, backbone, create
from stvit_jax.models.stvit import VARIANTS
from stvit_jax.trees import differences, leaves

_PUBLISHED_SIZE = 224  # of the pictures that most released weights are for
_CROP_SIZE = 512  # likewise, of segmenters


def usual_size(settings: Settings) -> int:
    """Side in pixels of the pictures that most released networks of such settings are for."""
    return _CROP_SIZE if "head" in settings else _PUBLISHED_SIZE


def save_pretrained(
    path: str | Path,
    model: Network,
    variables: Mapping[str, Any],
    *,
    classes: Sequence[str] | None = None,
    image_size: int | None = None,
    license: str | None = None,
) -> None:
    """Writes a network as a folder to be shared: whole, or not at all.

    Args:
      path: of the folder, which is not there yet.
      model: with or without a classifier (`num_classes=0`), or a segmenter.
      variables: its own, `{"params": ..., "batch_stats": ...}`.
      classes: names by label.
      image_size: side in pixels of the pictures that it is for; None: that of most released
        weights, 224, or 512 for a segmenter.
      license: of the weights, as `apache-2.0`.

    Raises:
      UserError: the path exists or cannot be written; these are not the variables of `model`, it is
        folded or has no part after the stages; or not one name for each class.
    """
    if backbone(model).features_only:
        raise UserError("a network with features_only is not whole: save the one it was made from")
    torch_weights.check_unfolded({} if model.folded else variables)
    if differing := differences(variables, abstract(model)):
        raise UserError(f"these are not the variables of this network: {'; '.join(differing)}")
    infinite = [name for name, x in leaves(variables).items() if not np.all(np.isfinite(x))]
    if infinite:
        raise UserError(f"these weights are not finite, in {listing(infinite, 3)}")
    outline = ("embed_dim", "depths")
    like = (
        n for n in VARIANTS if all(VARIANTS[n][f] == getattr(backbone(model), f) for f in outline)
    )
    found = weights.Weights(
        jax.tree.map(np.asarray, dict(variables)),
        settings.of(model, next(like, "stvit_small")),
        Path(path),
        {},
        classes=None if classes is None else tuple(classes),
        image_size=image_size,
    )
    write(path, found, license)


def from_pretrained(
    path: str | Path, ema: bool = False, **overrides: Any
) -> tuple[Network, dict[str, Any]]:
    """A network and its variables, from a shared folder or any other form of weights.

    Args:
      path: see `weights`; `hf_hub:OWNER/NAME[@REVISION]` is one.
      ema: the moving average in place of the raw weights.
      **overrides: of `create_model`: `dtype`, `features_only=True`, `num_classes` and others. A
        head of another size, or one that is missing, is initialised anew, and a line says so. Of a
        segmenter, those of `create_segmenter`; `features_only=True` is its backbone alone.

    Returns:
      `(model, variables)`, the second of `jax.Array`s.

    Raises:
      UserError: as `weights.read`; it carries no settings and no variant has its shapes; or the
        weights do not fit these overrides.
    """
    found = fit.identify(weights.read(path, ema))
    model = create(found.settings, **overrides)
    return model, fit.fitted(model, found)


def write(path: str | Path, found: weights.Weights, license: str | None = None) -> None:
    """As `save_pretrained`, of weights that are whole and have settings.

    Raises:
      UserError: the path exists or cannot be written, or there is not one name for each class.
    """
    if hub.is_address(str(path)) or places.is_address(str(path)):
        raise UserError(f"{path}: write a folder on this machine, and copy or upload that")
    count, size = found.settings["num_classes"], found.image_size
    if found.classes is not None:
        if not all(isinstance(name, str) for name in found.classes):
            raise UserError("classes holds something else than names")
        if len(found.classes) != count:
            raise UserError(f"classes holds {len(found.classes)} names for {count} classes")
    if size is not None and not (type(size) is int and 1 <= size <= weights.LARGEST_IMAGE):
        raise UserError(f"image_size is {kind_of(size)}: give the side of the pictures in pixels")
    text = json.dumps(_config(found, license), indent=2, ensure_ascii=False) + "\n"
    path = files.located(path)
    if path.exists() or path.is_symlink():
        raise UserError(f"{path} exists; remove it, or choose another output")
    try:
        with _whole(path) as folder:
            weights.write(folder / "model.safetensors", found)
            with files.replaced(folder / "config.json") as file:
                file.write(text.encode())
    except OSError as error:
        raise UserError(f"{path} cannot be written: {reason(error)}") from error


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A new folder that takes the name `path` when all of it is written, and not before."""
    files.make_folder_of(path)
    unfinished = path.with_name(f".{path.name[:100]}.{secrets.token_hex(8)}.tmp")
    unfinished.mkdir()
    try:
        yield unfinished
        unfinished.rename(path)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _config(found: weights.Weights, license: str | None) -> dict[str, Any]:
    """What `config.json` holds; the preprocessing is that of `data.eval_image` and `normalize`."""
    own, size = found.settings, found.image_size or usual_size(found.settings)
    names = {} if found.classes is None else {"label_names": list(found.classes)}
    if "head" in own:
        pooled, cut, prefix, classifier = {}, {}, "backbone.", "decode_head.conv_seg"
    else:
        pooled = {"num_features": own["projection"], "global_pool": "avg"}
        cut = {
            "interpolation": "bicubic",
            "crop_pct": crop_share(size),
            "crop_mode": "squash" if size <= SMALL_SIZE else "center",
            "pool_size": None,
        }
        prefix, classifier = "", "head"
    return {
        "architecture": own["name"],
        "num_classes": own["num_classes"],
        **pooled,
        **names,
        "pretrained_cfg": {
            "input_size": [own["in_chans"], size, size],
            "fixed_input_size": False,
            **cut,
            "mean": list(MEAN),
            "std": list(STD),
            "num_classes": own["num_classes"],
            "first_conv": f"{prefix}patch_embed.proj.0",
            "classifier": classifier,
            "license": license,
        },
        "stvit_config": own,
        "image_size": size,
    }
