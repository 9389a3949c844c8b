"""Prepared sets of tfds: finding one by its name, and what to do where there is none."""

import os
import re
import shlex
from typing import Any

from stvit_jax.data import files
from stvit_jax.errors import UserError, described, did_you_mean, listing

# What people call ImageNet-1k.
IMAGENET = ("imagenet", "imagenet1k", "imagenet_1k", "imagenet1000", "ilsvrc2012", "ilsvrc_2012")


def find_prepared(name: str, data_dir: str, *, labelled: bool) -> Any:
    """The tfds builder of a prepared set, made from its files: no code of the set is imported.

    Args:
      name: as `name/config` for a set with several.
      data_dir: tfds's data directory, empty for its default.
      labelled: whether its images must have one class label each.

    Raises:
      UserError: there is no such set, it is not prepared or not as ArrayRecord, or it has no images
        or no labels.
    """
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import read_only_builder

    from stvit_jax.data import digits  # a builder of tfds, which nothing else here needs at import

    _check_name(name, data_dir)
    try:
        if name == "digits":
            digits.prepare(data_dir)
        else:
            _check_dir(data_dir)
        builder = read_only_builder.builder_from_files(name, data_dir=data_dir or None)
        info = builder.info
        len(info.features)  # read here, so that damage is noticed here
        if not info.splits:
            raise _unfinished(name, builder.data_path)
    except UserError:
        raise
    except tfds.core.DatasetNotFoundError:
        raise _not_found(name, data_dir, labelled) from None
    except Exception as error:
        if isinstance(error, OSError) and error.errno:
            raise files.fault(error.filename or str(_root(data_dir)), error) from error
        # Metadata that is missing, or that no reader takes.
        raise UserError(
            f"tfds data set {name!r} cannot be opened ({described(error)}): prepare the set again "
            "if its files are damaged"
        ) from error
    formats = {file_format.value for file_format in info.available_file_formats()}
    if "array_record" not in formats:
        raise UserError(
            f"{builder.data_path} is prepared as {'/'.join(sorted(formats))}, which has no random "
            "access; convert it once with: python -m stvit_jax.data.array_record "
            + shlex.quote(str(builder.data_path))
        )
    image_and_label(name, info, labelled=labelled)
    return builder


def image_and_label(name: str, info: Any, *, labelled: bool) -> tuple[str, str | None]:
    """Names of the image feature and of the class label; None where there is no single label.

    Raises:
      UserError: the set has no images or, if `labelled`, no label.
    """
    import tensorflow_datasets as tfds

    image_key, label_key = (info.supervised_keys or ("image", "label"))[:2]
    kinds = tfds.features.FeaturesDict
    features = dict(info.features.items()) if isinstance(info.features, kinds) else {}
    label = features.get(label_key)
    has_label = isinstance(label, tfds.features.ClassLabel) and bool(label.num_classes)
    if not isinstance(features.get(image_key), tfds.features.Image):
        missing = f"Image feature {image_key!r}"
    elif labelled and not has_label:
        missing = f"ClassLabel feature {label_key!r}"
    else:
        return image_key, label_key if has_label else None
    raise UserError(
        f"tfds data set {name!r} has no {missing}, so it is not one of "
        f"{'labelled images' if labelled else 'images'}: choose another data.name"
    )


def _base(name: str) -> str:
    """The set's name without config and version."""
    return re.split("[/:]", name)[0]


def _check_name(name: str, data_dir: str) -> None:
    """Refuses what is no name of a set: nothing, a path, a part of a split, other characters."""
    from tensorflow_datasets.core import naming

    if not name:
        raise UserError(
            "data.name is empty: name a set of tfds, such as imagenet2012 or cifar100, or set "
            "data.source=folder for class folders in data.dir"
        )
    if name[0] in "/.~\\":
        raise UserError(
            f"data.name {name!r} is a path: data.name is the name of a tfds set, and data.dir the "
            "directory that it is prepared in; class folders need data.source=folder"
        )
    split = re.search(r"(/|:)(train|validation|val|valid|dev|test|all)\b[^/:]*$|[\[\]+%]", name)
    if split:
        raise UserError(
            f"data.name {name!r} names a part of a set, which is not possible: write "
            f"data.name={_base(name).split('[')[0]}; training takes the split train, evaluation "
            "validation or test"
        )
    try:
        naming.parse_builder_name_kwargs(name)
    except ValueError:
        raise _unknown(name, data_dir) from None


def _check_dir(data_dir: str) -> None:
    from etils import epath

    if not data_dir:
        return
    path = epath.Path(data_dir)
    if not path.exists():
        raise UserError(f"data.dir {data_dir} does not exist: create it, or correct data.dir")
    if not path.is_dir():
        raise UserError(f"data.dir {data_dir} is a file: name the directory that tfds prepared in")


def _not_found(name: str, data_dir: str, labelled: bool) -> UserError:
    """What to do about a set that is not there: look elsewhere, correct its name, or prepare it."""
    import tensorflow_datasets as tfds

    known = tfds.list_builders(with_community_datasets=False)  # "digits" registered itself
    try:
        if elsewhere := _elsewhere(name, data_dir):
            return elsewhere
        return (
            _prepare(name, data_dir, labelled) if _base(name) in known else _unknown(name, data_dir)
        )
    except OSError as error:
        return files.fault(error.filename or str(_root(data_dir)), error)


def _elsewhere(name: str, data_dir: str) -> UserError | None:
    """Of a directory that holds something else, or the set above or below, or another variant."""
    base, root = _base(name), _root(data_dir)
    if not root.exists():
        return None
    for parent in list(root.parents)[:3]:
        if parent / base in (root, *root.parents):
            return UserError(
                f"data.dir {data_dir} lies inside of the prepared set: set data.dir={parent}"
            )
    if _is_prepared(root / base):
        return UserError(
            f"tfds data set {name!r} is not in {root / base}, which has "
            f"{listing(_variants(root / base))}: correct data.name"
        )
    inside = _folders(root)
    for folder in inside:
        if _is_prepared(root / folder / base):
            return UserError(
                f"{name} is not in data.dir {data_dir}, but in a folder inside: set "
                f"data.dir={root / folder}"
            )
    if any(folder in ("train", "val") and _folders(root / folder) for folder in inside):
        return UserError(
            f"data.dir {data_dir} holds class folders and no tfds data set: set data.source=folder"
        )
    return None


def _unfinished(name: str, place: Any) -> UserError:
    inside = _folders(place)
    for folder in inside:
        _folders(place / folder)  # tfds takes what it may not read for nothing
    return UserError(
        f"{place} holds no finished preparation of tfds data set {name!r} (folders there: "
        f"{listing(inside)}): remove what is unfinished and prepare the set again"
    )


def _unknown(name: str, data_dir: str) -> UserError:
    """Of a set that tfds does not know."""
    import tensorflow_datasets as tfds

    known = tfds.list_builders(with_community_datasets=False)
    root = _root(data_dir)
    folders = _folders(root) if root.exists() else []
    if (base := _base(name)) in folders:
        return _unfinished(name, root / base)
    there = [folder for folder in folders if _is_prepared(root / folder)]
    plain = base.lower().replace("-", "_")
    plain = "imagenet2012" if plain in IMAGENET else plain
    if plain in known:
        close = f"did you mean {plain}?"
    else:
        close = did_you_mean(plain, dict.fromkeys([*there, *known]), most=3).rstrip()
    return UserError(
        f"data.name {name!r} is not a tfds data set, and not prepared in {root} ("
        f"{'' if data_dir else 'the default of data.dir; '}there: {listing(there)}): "
        f"{close or 'correct data.name or data.dir'}"
    )


def _prepare(name: str, data_dir: str, labelled: bool) -> UserError:
    """The command that prepares a set of tfds."""
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name, data_dir=data_dir or None)
        image_and_label(name, builder.info, labelled=labelled)
    except UserError as error:
        return error
    except Exception as error:  # no such variant or version
        return UserError(f"tfds data set {name!r} cannot be prepared: {described(error)}")
    where = f", data_dir={data_dir!r}" if data_dir else ""
    manual, note = "", ""
    if instructions := builder.MANUAL_DOWNLOAD_INSTRUCTIONS:
        manual = ", download_config=tfds.download.DownloadConfig(manual_dir='MANUAL_DIR')"
        note = f", with your own folder for MANUAL_DIR; {' '.join(instructions.split())}"
    return UserError(
        f"tfds data set {name!r} is not prepared in {data_dir or 'the default tfds directory'}; "
        'prepare it once with: python -c "import tensorflow_datasets as tfds; '
        f"tfds.builder({name!r}{where}).download_and_prepare(file_format='array_record'{manual})\""
        + note
    )


def _root(data_dir: str) -> Any:
    from etils import epath
    from tensorflow_datasets.core import constants

    return epath.Path(data_dir or constants.DATA_DIR)


def _folders(path: Any) -> list[str]:
    return sorted(entry.name for entry in path.iterdir() if os.path.isdir(entry))


def _variants(path: Any) -> list[str]:
    """Prepared versions, or configs with versions, of a set's directory; `CONFIG/VERSION`."""
    try:
        found = [*path.glob("*/features.json"), *path.glob("*/*/features.json")]
    except OSError:  # not for us to read, so it is of no help
        return []
    variants = (str(file.parent.relative_to(path)) for file in found)
    return sorted(variant for variant in variants if not variant.startswith("incomplete"))


def _is_prepared(path: Any) -> bool:
    return bool(_variants(path))
