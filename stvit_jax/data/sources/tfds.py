"""Sets of tfds, prepared as ArrayRecord."""

import dataclasses
from typing import Any

import numpy as np

from stvit_jax.console import say
from stvit_jax.data.records import Records
from stvit_jax.data.sources import Source, check_labels
from stvit_jax.data.sources.prepared import find_prepared, image_and_label
from stvit_jax.data.sources.tenth import Tenth
from stvit_jax.errors import UserError, listing

EVAL_SPLITS = ("validation", "val", "valid", "dev", "test")


@dataclasses.dataclass(frozen=True)
class TfdsSource(Source):
    """A split in ArrayRecord files.

    An example has all features of the set, images left encoded; "image" and "label" are also the
    canonical names of the two that the set calls its input and its class.

    Attributes:
      name: as `tfds` has it.
      split: `train`, ...
      records: the serialised examples.
      features: tfds's reader of an example.
      decoders: that leave images encoded.
      image_key: the feature that holds the image.
      label_key: the feature that holds the class; None where the set has no single class label.
      label_names: names by number, of every feature that holds a class or a sequence of classes.
    """

    name: str
    split: str
    records: Records
    features: Any
    decoders: dict[str, Any]
    image_key: str
    label_key: str | None
    label_names: dict[str, tuple[str, ...]]

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.label_names[self.label_key] if self.label_key else ()

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self.records[index]
        try:
            example = self.features.deserialize_example_np(record, decoders=self.decoders)
            example["image"] = example[self.image_key]
            if self.label_key:
                example["label"] = int(example[self.label_key])
        except Exception as error:  # whatever tfds's parser meets in a record that is no example
            raise self.records.fault(index, error) from error
        return example

    def where(self, index: int) -> str:
        return self.records.where(index)


def open_tfds(name: str, data_dir: str, *, train: bool) -> TfdsSource:
    """Opens one split of any set of tfds that has images.

    Args:
      name: as `name/config` for a set with several.
      data_dir: tfds's data directory, empty for its default.
      train: the split to train on, else the one to evaluate on.

    Raises:
      UserError: there is no such set, or it is not prepared, or has no images or no such split.
    """
    builder = find_prepared(name, data_dir, labelled=False)
    return _open(name, builder, "train" if train else _eval_split(builder.info))


def open_labelled(name: str, data_dir: str, *, train: bool) -> Source:
    """Opens one split of a set of tfds whose images have one class label each.

    Of a set with `train` and nothing to evaluate on, every tenth record is held out for that.

    Args:
      name: as `name/config` for a set with several.
      data_dir: tfds's data directory, empty for its default.
      train: the split to train on, else the one to evaluate on.

    Raises:
      UserError: as `open_tfds`, or a label is missing or outside of the classes.
    """
    builder = find_prepared(name, data_dir, labelled=True)
    eval_split = _eval_split(builder.info)
    hold_out = not eval_split and "train" in builder.info.splits
    split = "train" if train or hold_out else eval_split
    source: Source = _open(name, builder, split)
    if hold_out:
        whole, source = source, Tenth(source, held_out=not train)
        if not train:
            say(
                f"{name} has no split to evaluate on ({', '.join(EVAL_SPLITS)}): every tenth "
                f"record of train, {len(source)} of {len(whole)}, is held out"
            )
    check_labels(source, f"the split {split} of tfds data set {name!r}")
    return source


def _open(name: str, builder: Any, split: str | None) -> TfdsSource:
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import file_adapters

    info = builder.info
    if split not in info.splits:
        wanted = split or f"to evaluate on ({', '.join(EVAL_SPLITS)})"
        raise UserError(
            f"tfds data set {name!r} has no split {wanted}; it has {listing(info.splits)}: choose "
            "another data.name"
        )
    lengths = info.splits[split].shard_lengths
    if not sum(lengths):
        raise UserError(
            f"the split {split} of tfds data set {name!r} in {builder.data_path} is empty: prepare "
            "the set again, or choose another data.name"
        )
    image_key, label_key = image_and_label(name, info, labelled=False)
    template = info.splits[split].filename_template.replace(
        filetype_suffix=file_adapters.FileFormat.ARRAY_RECORD.file_suffix
    )
    images = (k for k, kind in info.features.items() if isinstance(kind, tfds.features.Image))
    return TfdsSource(
        name,
        split,
        Records(template, np.cumsum(lengths)),
        info.features,
        {key: tfds.decode.SkipDecoding() for key in images},
        image_key,
        label_key,
        _label_names(info.features),
    )


def _eval_split(info: Any) -> str | None:
    return next((split for split in EVAL_SPLITS if split in info.splits), None)


def _label_names(features: Any) -> dict[str, tuple[str, ...]]:
    import tensorflow_datasets as tfds

    names = {}
    for key, feature in features.items():
        if isinstance(feature, tfds.features.Sequence):
            feature = feature.feature
        if isinstance(feature, tfds.features.ClassLabel) and feature.num_classes:
            names[key] = tuple(feature.int2str(i) for i in range(feature.num_classes))
    return names
