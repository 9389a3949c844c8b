"""python -m benchmarks.input: this loader beside the published input pipeline, in one run.

The published one is torchvision's and timm 0.5.4's transforms on Pillow, installed only for this,
without what they depend on (torchvision 0.28 belongs to the torch 2.13 of requirements-test.txt):

    pip install --no-deps torchvision==0.28.0 timm==0.5.4

Both take the same generated JPEGs of 500x375 to 224 pixels, on one core each, alternating; a figure
is the median over the rounds of images per second of CPU time, so that other programs on the
machine hardly matter. Two comparisons:

- equal work: decode, random resized crop, flip, to uint8 pixels (and how much of ours is decoding);
- the whole host side: published, all of the transform, with RandAugment, normalisation and erasing,
  and the batch put together; ours, the loader as training uses it (the same three steps and the
  order, parts and batches around them), for the rest happens on the device.

What that rest takes of the device (RandAugment, erasing, normalisation, mixup) is printed, too.
"""

import argparse
import importlib.metadata
import io
import itertools
import os
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from PIL import Image

from stvit_jax.augment import augment_batch
from stvit_jax.command_line import entry
from stvit_jax.console import say
from stvit_jax.data.decode import decode_rgb, train_image
from stvit_jax.data.examples import Examples
from stvit_jax.data.loader import Batches
from stvit_jax.data.order import Order
from stvit_jax.data.parts import TrainPart
from stvit_jax.data.sources import Source, open_source
from stvit_jax.data.sources.fake import SIZE
from stvit_jax.errors import UserError

IMAGE_SIZE = 224
BATCH = 128  # images: a device's share as published

# Takes encoded images through a pipeline.
Pipeline = Callable[[list[bytes]], object]


def published() -> tuple[Pipeline, Pipeline]:
    """The published pipeline: (decode, crop and flip alone; the whole host side).

    Raises:
      UserError: it is not installed.
    """
    torch, create_transform = _import_published()
    torch.set_num_threads(1)
    whole = create_transform(
        IMAGE_SIZE,
        is_training=True,
        auto_augment="rand-m9-mstd0.5-inc1",
        interpolation="bicubic",
        re_prob=0.25,
        re_mode="pixel",
        re_count=1,
    )
    crop_and_flip = type(whole)(whole.transforms[:2])

    def decoded(data: bytes) -> Image.Image:
        return Image.open(io.BytesIO(data)).convert("RGB")

    def augmented(data: bytes) -> "torch.Tensor":
        while True:
            try:
                return whole(decoded(data))
            except ValueError:  # new Pillow refuses to posterise to 0 bits: draw again
                continue

    def equal_work(images: list[bytes]) -> None:
        for data in images:
            np.asarray(crop_and_flip(decoded(data)))

    def everything(images: list[bytes]) -> None:
        torch.stack([augmented(data) for data in images])

    return equal_work, everything


def ours(source: Source) -> tuple[Pipeline, Pipeline]:
    """Our pipeline likewise; the second one reads `source`, which holds the same images."""
    rng = np.random.default_rng(0)
    order = Order(len(source), BATCH, repeats=3)
    spec = {"image": ((IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8), "label": ((), np.int32)}
    part = TrainPart(Examples(source, _load, spec), np.arange(BATCH), order)
    numbers = itertools.count()

    def equal_work(images: list[bytes]) -> None:
        for data in images:
            train_image(data, IMAGE_SIZE, rng, True)

    def everything(images: list[bytes]) -> None:
        number = next(numbers)
        # One batch and no more: an endless loader would work ahead in the others' time.
        (batch,) = Batches(part, number, number + 1, workers=0)
        assert len(batch["image"]) == len(images)

    return equal_work, everything


def _load(features: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    image = train_image(features["image"], IMAGE_SIZE, rng, True)
    return {"image": image, "label": features["label"]}


def measure(pipelines: dict[str, Pipeline], images: list[bytes], rounds: int) -> dict[str, float]:
    """Median images per second of CPU time, the pipelines taking turns after one warm-up each."""
    speeds: dict[str, list[float]] = {name: [] for name in pipelines}
    for number in range(rounds + 1):
        for name, pipeline in pipelines.items():
            start = time.process_time()
            pipeline(images)
            if number:
                speeds[name].append(len(images) / (time.process_time() - start))
    return {name: statistics.median(values) for name, values in speeds.items()}


def device_seconds(rounds: int) -> float:
    """Median seconds that the device augmentation of BATCH images takes."""
    augment = jax.jit(partial(augment_batch, num_classes=1000, group_size=BATCH))
    rng = np.random.default_rng(0)
    images = jax.device_put(rng.integers(0, 256, (BATCH, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8))
    labels = jax.device_put(rng.integers(0, 1000, BATCH))
    seconds = []
    for number in range(rounds + 1):
        start = time.perf_counter()
        jax.block_until_ready(augment(jax.random.key(number), images, labels))
        if number:
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the two comparisons and the device time.

    Raises:
      UserError: the published pipeline is not installed.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.input")
    parser.add_argument("--rounds", type=int, default=20, help="of every pipeline (20)")
    rounds = parser.parse_args(argv).rounds
    source = open_source("fake", "", "", train=True)
    images = [source[index]["image"] for index in range(BATCH)]
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})  # for the threads that start from here on, too
    names = ("published, equal work", "published, whole host side")
    pipelines = dict(zip(names, published(), strict=True))
    pipelines |= dict(zip(("ours, equal work", "ours, whole host side"), ours(source), strict=True))
    pipelines["ours, decoding"] = lambda images: [decode_rgb(data) for data in images]
    speeds = measure(pipelines, images, rounds)
    os.sched_setaffinity(0, cores)

    size = sum(map(len, images)) / len(images)
    say(
        f"JPEGs of {SIZE[0]}x{SIZE[1]}, {size / 1000:.0f} kB on average, to "
        f"{IMAGE_SIZE} pixels; images/s per core, medians of {rounds} rounds of {len(images)}"
    )
    for work in ("equal work", "whole host side"):
        theirs, own = speeds[f"published, {work}"], speeds[f"ours, {work}"]
        say(f"{work}: published {theirs:.0f}, ours {own:.0f}, ratio {own / theirs:.2f}")
    share = speeds["ours, equal work"] / speeds["ours, decoding"]
    say(f"decoding is {share:.0%} of our equal work")
    seconds = device_seconds(rounds=5)
    say(
        f"augmentation of {BATCH} images on {jax.devices()[0].device_kind}: "
        f"{1000 * seconds:.2f} ms, {BATCH / seconds:.0f} images/s"
    )


def _import_published() -> tuple:
    """torch, and timm's `create_transform`; UserError where one is not installed."""
    try:
        import torch

        version = importlib.metadata.version("torchvision")
        if torch.version.cuda is None and "+cpu" not in version:
            # PyPI's torchvision is built for CUDA: beside a CPU torch its operators, which no
            # transform uses, do not load, and its import then fails for want of these two.
            for name in ("nms", "qnms"):
                signature = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                torch.library.define(f"torchvision::{name}", signature)
        from timm.data import create_transform
    except ImportError as error:
        raise UserError(
            f"{error}; install the published pipeline with: "
            "pip install --no-deps torchvision==0.28.0 timm==0.5.4"
        ) from None
    return torch, create_transform


if __name__ == "__main__":
    entry(main)
