"""python -m stvit_jax.data.array_record DIR: adds ArrayRecord files to a set prepared as TFRecord.

DIR is the set's version directory, such as .../imagenet2012/5.1.0. Records are copied as they are,
the TFRecord files stay, and the metadata names the new format beside the old. It needs TensorFlow,
to read the old files with their checksums. tfds's own converter does the same but does not start
without apache-beam, which downgrades other packages.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from stvit_jax.console import Progress, say
from stvit_jax.errors import UserError, described, one_line


def convert(version_dir: str) -> None:
    """Converts the set in `version_dir`; finished files of an interrupted conversion are kept.

    Raises:
      UserError: not a prepared tfds set, not one in TFRecord, damaged, not to be written, or
        TensorFlow is missing.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # it greets with lines of its own
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    try:
        import tensorflow as tf
    except ImportError as error:
        raise UserError(f"{error}; to convert, run: pip install tensorflow-cpu") from None
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import file_adapters
    from tensorflow_datasets.core.dataset_info import write_dataset_info_proto

    if not (Path(version_dir) / "dataset_info.json").is_file():
        raise UserError(f"{version_dir} is not the version directory of a prepared tfds data set")
    info = tfds.builder_from_directory(version_dir).info
    old, new = file_adapters.FileFormat.TFRECORD, file_adapters.FileFormat.ARRAY_RECORD
    if new in info.available_file_formats():
        say(f"{version_dir} has ArrayRecord files already")
        return
    if info.file_format != old:
        raise UserError(f"{version_dir} is in format {info.file_format}, not TFRecord")

    todo = []  # (old file, new file, records)
    for split in info.splits.values():
        template = split.filename_template.replace(filetype_suffix=new.file_suffix)
        for shard, source in enumerate(split.filepaths):
            target = template.sharded_filepath(shard_index=shard, num_shards=split.num_shards)
            if not target.exists():
                todo.append((source, target, split.shard_lengths[shard]))
    say(f"converting {len(todo)} files of {version_dir}")
    progress = Progress("converted files", len(todo))
    for done, (source, target, length) in enumerate(todo, start=1):
        records = file_adapters.TfRecordFileAdapter.make_tf_data(os.fspath(source))
        partial = target.parent / f"{target.name}.partial"
        try:
            file_adapters.ArrayRecordFileAdapter.write_examples(
                partial, enumerate(records.as_numpy_iterator())
            )
        except tf.errors.DataLossError as error:
            raise UserError(
                f"{source} is damaged, prepare the set again: {one_line(error.message)}"
            ) from None
        except tf.errors.OpError as error:
            raise UserError(
                f"{source} cannot be read ({one_line(error.message)}): restore it or prepare the "
                "set again"
            ) from None
        except (OSError, RuntimeError) as error:  # array_record raises the latter
            raise _not_written(partial, error) from error
        count = file_adapters.ArrayRecordFileAdapter.num_examples(partial)
        if count != length:
            raise UserError(f"{source} holds {count} of {length} records: prepare the set again")
        partial.rename(target)  # only whole files get their names
        progress.update(done)
    info.add_alternative_file_format(new.value)
    try:
        write_dataset_info_proto(info.as_proto, dataset_info_dir=info.data_dir)
    except OSError as error:
        raise _not_written(version_dir, error) from error
    say(f"{version_dir} has ArrayRecord files now, which train.py reads")


def _not_written(path: object, error: Exception) -> UserError:
    return UserError(
        f"{path} cannot be written ({described(error)}): make room or give the right to write; the "
        "same command goes on with the next file"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """The command.

    Raises:
      UserError: as `convert`.
    """
    parser = argparse.ArgumentParser(
        prog="python -m stvit_jax.data.array_record", description=__doc__.splitlines()[0]
    )
    parser.add_argument("dir", help="the set's version directory")
    convert(parser.parse_args(argv).dir)


if __name__ == "__main__":
    from stvit_jax.command_line import entry

    entry(main)
