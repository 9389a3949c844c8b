"""Sets of tfds, prepared as ArrayRecord."""

import bisect
import dataclasses
import difflib
import itertools
import shlex
from typing import Any

from stvit_jax.data.sources import Source
from stvit_jax.errors import UserError, described

EVAL_SPLITS = ("validation", "test")


@dataclasses.dataclass(frozen=True)
class TfdsSource(Source):
    """A split in ArrayRecord files.

    An example has all features of the set, images left encoded; "image" and "label" are also the
    canonical names of the two that the set calls its input and its class.

    Attributes:
      name: as `tfds` has it.
      records: tfds's random access to the examples of the split, images left encoded.
      image_key: the feature that holds the image.
      label_key: the feature that holds the class; None where the set has no single class label.
      label_names: names by number, of every feature that holds a class or a sequence of classes.
    """

    name: str
    records: Any
    image_key: str
    label_key: str | None
    label_names: dict[str, tuple[str, ...]]

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.label_names[self.label_key] if self.label_key else ()

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            features = self.records[index]
        except Exception as error:
            # array_record raises RuntimeError for a failed checksum and for a missing file; what
            # passes and is no example all the same fails in tfds's parser.
            raise UserError(
                f"{self.where(index)} cannot be read, the file is damaged: restore it or prepare "
                f"the data set again ({described(error)})"
            ) from error
        features = features | {"image": features[self.image_key]}
        return features | ({"label": int(features[self.label_key])} if self.label_key else {})

    def where(self, index: int) -> str:
        parts = self.records.dataset_info.splits[self.records.split].file_instructions
        ends = list(itertools.accumulate(part.take for part in parts))
        part = bisect.bisect_right(ends, index)
        within = index - ends[part] + parts[part].take
        return f"{parts[part].filename}, record {within}"


def open_tfds(name: str, data_dir: str, *, train: bool, labelled: bool = False) -> TfdsSource:
    """Opens one split of any set of tfds that has images.

    Args:
      name: as `name/config` for a set with several.
      data_dir: tfds's data directory, empty for its default.
      train: the split to train on, else the one to evaluate on.
      labelled: refuse a set whose images do not have one class label each.

    Raises:
      UserError: there is no such set, or it is not prepared, or has no images (or no labels).
    """
    builder = _find_prepared(name, data_dir, labelled)
    formats = {file_format.value for file_format in builder.info.available_file_formats()}
    if "array_record" not in formats:
        raise UserError(
            f"{builder.data_path} is prepared as {'/'.join(sorted(formats))}, which has no random "
            "access; convert it once with: python -m stvit_jax.data.array_record "
            + shlex.quote(str(builder.data_path))
        )

    splits = builder.info.splits
    wanted = ("train",) if train else EVAL_SPLITS
    split = next((split for split in wanted if split in splits), None)
    if split is None:
        raise UserError(
            f"tfds data set {name!r} has no split {' or '.join(wanted)} "
            f"(it has {', '.join(splits)}): choose another data.name"
        )
    if not splits[split].num_examples:
        raise UserError(
            f"the split {split} of tfds data set {name!r} in {builder.data_path} is empty: prepare "
            "the set again, or choose another data.name"
        )
    image_key, label_key = _image_and_label(name, builder.info, labelled)
    import tensorflow_datasets as tfds

    features = builder.info.features
    images = [key for key, kind in features.items() if isinstance(kind, tfds.features.Image)]
    records = builder.as_data_source(
        split,
        decoders={key: tfds.decode.SkipDecoding() for key in images},
        file_format="array_record",
    )
    return TfdsSource(name, records, image_key, label_key, _label_names(features))


def _find_prepared(name: str, data_dir: str, labelled: bool) -> Any:
    """The builder of a prepared set, made from its files: no code of the set is imported."""
    import tensorflow_datasets as tfds
    from etils import epath
    from tensorflow_datasets.core import read_only_builder

    from stvit_jax.data import digits

    try:
        if name == "digits":
            digits.prepare(data_dir)
        elif data_dir and not epath.Path(data_dir).exists():
            raise UserError(f"data.dir {data_dir} does not exist: create it, or correct data.dir")
        builder = read_only_builder.builder_from_files(name, data_dir=data_dir or None)
        len(builder.info.features)  # read here, so that damage is noticed here
        return builder
    except UserError:
        raise
    except tfds.core.DatasetNotFoundError:
        raise _unprepared(name, data_dir, labelled) from None
    except Exception as error:  # a name that tfds cannot parse; metadata that no reader takes
        raise UserError(
            f"tfds data set {name!r} cannot be opened ({described(error)}): correct data.name, or "
            "prepare the set again if its files are damaged"
        ) from error


def _unprepared(name: str, data_dir: str, labelled: bool) -> UserError:
    """What to do about a set that is not there: correct its name, or the command to prepare it."""
    import tensorflow_datasets as tfds

    known = tfds.list_builders(with_community_datasets=False)  # "digits" registered itself
    base = name.split("/")[0].split(":")[0]
    if base not in known:
        close = difflib.get_close_matches(base, known) or ["digits", "imagenet2012", "cifar100"]
        return UserError(
            f"data.name {name!r} is not a tfds data set: did you mean {' or '.join(close)}?"
        )
    try:
        builder = tfds.builder(name, data_dir=data_dir or None)
        _image_and_label(name, builder.info, labelled)
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


def _image_and_label(name: str, info: Any, labelled: bool) -> tuple[str, str | None]:
    """Names of the image feature and of the class label; None where there is no single label.

    Raises:
      UserError: the set has no images or, if `labelled`, no label.
    """
    import tensorflow_datasets as tfds

    image_key, label_key = (info.supervised_keys or ("image", "label"))[:2]
    kinds = tfds.features.FeaturesDict
    features = dict(info.features.items()) if isinstance(info.features, kinds) else {}
    has_label = isinstance(features.get(label_key), tfds.features.ClassLabel)
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


def _label_names(features: Any) -> dict[str, tuple[str, ...]]:
    import tensorflow_datasets as tfds

    names = {}
    for key, feature in features.items():
        if isinstance(feature, tfds.features.Sequence):
            feature = feature.feature
        if isinstance(feature, tfds.features.ClassLabel):
            names[key] = tuple(feature.int2str(i) for i in range(feature.num_classes))
    return names
