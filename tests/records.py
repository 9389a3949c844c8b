"""Damage to prepared data: one bit of the record that a slot of a batch takes."""

from pathlib import Path

import numpy as np

from stvit_jax.data.order import Order
from stvit_jax.data.sources import open_source


class Corrupted:
    """`file` and `record` of the digits under `data_dir`; `mend` puts the bit back."""

    def __init__(self, data_dir: Path, order: Order, *, batch: int, slot: int) -> None:
        """That of a batch and slot in the order of training."""
        source = open_source("tfds", "digits", str(data_dir), train=True)
        positions = order.positions(batch, np.arange(order.batch_size))
        index = order.images(0, positions)[0][slot]
        self.file, self.record = source.where(index).split(", record ")
        self._sound = Path(self.file).read_bytes()
        damaged = bytearray(self._sound)
        damaged[self._sound.index(source[index]["image"]) + 40] ^= 4
        Path(self.file).write_bytes(damaged)

    def mend(self) -> None:
        """Puts the bit back."""
        Path(self.file).write_bytes(self._sound)
