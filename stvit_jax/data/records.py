"""Random access to the records of ArrayRecord files, with a bounded number of them open.

tfds's own data source keeps every file open that it has read from. ImageNet has over a thousand,
and a process of a usual machine may open 1,024 files; training opens others, too.
"""

import collections
import dataclasses
import os
import threading
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from stvit_jax.data import files
from stvit_jax.errors import UserError, described

RESTORE = "restore it or prepare the data set again"


@dataclasses.dataclass(frozen=True)
class Records:
    """The records of a split, in the order of its files.

    Attributes:
      template: tfds's `ShardedFileTemplate` of the files' paths.
      ends: of every file, the number of records up to its end.
    """

    template: Any
    ends: np.ndarray

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> bytes:
        """A record.

        Raises:
          UserError: its file is missing, cannot be opened or is damaged.
        """
        file, place = self._place(index)
        try:
            return self._read(file, place)
        except Exception:  # try again with other files closed, and this one opened anew
            _READERS.clear()
        try:
            return self._read(file, place)
        except Exception as error:  # RuntimeError, whatever the reason is
            raise self.fault(index, error) from error

    def where(self, index: int) -> str:
        """The file of a record, and the place there."""
        file, place = self._place(index)
        return f"{self._path(file)}, record {place}"

    def fault(self, index: int, error: Exception) -> UserError:
        """What is wrong with a record that does not read or does not parse."""
        path = self._path(self._place(index)[0])
        try:
            with open(path, "rb") as file:
                while file.read(2**24):  # a disk that fails says so
                    pass
        except OSError as refused:
            return files.fault(path, refused, RESTORE)
        return UserError(
            f"{self.where(index)} cannot be read, the file is damaged: {RESTORE} "
            f"({described(error)})"
        )

    def _place(self, index: int) -> tuple[int, int]:
        """(number of the file, record in it)."""
        file = int(np.searchsorted(self.ends, index, side="right"))
        if not 0 <= index < len(self):
            raise IndexError(index)
        return file, index - self._start(file)

    def _start(self, file: int) -> int:
        return int(self.ends[file - 1]) if file else 0

    def _path(self, file: int) -> str:
        path = self.template.sharded_filepath(shard_index=file, num_shards=len(self.ends))
        return os.fspath(path)

    def _read(self, file: int, place: int) -> bytes:
        reader = _READERS.open(self._path(file))
        length = int(self.ends[file]) - self._start(file)
        if reader.num_records() != length:
            raise RuntimeError(f"it holds {reader.num_records()} of {length} records")
        (record,) = reader.read([place])
        return record


class _Readers:
    """The open files of this process; the one that was read longest ago is closed for another."""

    def __init__(self) -> None:
        self._open: collections.OrderedDict[str, ArrayRecordReader] = collections.OrderedDict()
        self._lock = threading.Lock()

    def open(self, path: str) -> ArrayRecordReader:
        with self._lock:
            if path in self._open:
                self._open.move_to_end(path)
                return self._open[path]
        reader = ArrayRecordReader(
            path, options="readahead_buffer_size:0", file_reader_buffer_size=2**15
        )
        if not reader.ok():
            reader.read([0])  # raises, with the reason, but for a file that ends too early
            raise RuntimeError("it ends too early")
        # Half of what may be open: sockets, queues of workers and checkpoints take their share.
        most = files.allow_many_open() // 2
        with self._lock:
            self._open[path] = reader
            while len(self._open) > most:
                self._open.popitem(last=False)  # closed when no thread reads from it any more
        return reader

    def clear(self) -> None:
        with self._lock:
            self._open.clear()


_READERS = _Readers()
