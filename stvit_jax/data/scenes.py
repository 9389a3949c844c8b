"""Scenes and their annotations to arrays: everything the host does to them.

Training is mmsegmentation's RandomResize, RandomCrop and RandomFlip; evaluation resizes and leaves
the labels as they are. The rest (photometric distortion, normalisation) runs on the device. Of a
resized image the crop alone is computed, once the labels have decided where it is.

Shapes: S side of a crop, H, W of an image as it is on disk, h, w of one that was resized.
"""

import io

import numpy as np

from stvit_jax.data.annotations import IGNORED, check_size, read_annotation, scene_size
from stvit_jax.data.cv2_resize import Size, Window, resize_bilinear, resize_nearest
from stvit_jax.data.decode import UnreadableImage, decode_rgb

CROP_TRIES = 10

Arrays = dict[str, np.ndarray]


def resized_size(
    height: int, width: int, long: int = 2048, short: int = 512, ratio: float = 1.0
) -> Size:
    """The largest size of the same shape that fits into a box, whichever way the box lies.

    Args:
        height: of the image.
        width: of the image.
        long: longer side of the box.
        short: shorter side of the box.
        ratio: that both sides of the box are multiplied by, and rounded down.

    Returns:
        height and width, at least 1.
    """
    long, short = int(long * ratio), int(short * ratio)
    factor = min(long / max(height, width), short / min(height, width))
    return max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))


def train_scene(
    image: bytes,
    annotation: bytes,
    size: int,
    rng: np.random.Generator,
    *,
    classes: int,
    scale_range: tuple[float, float] = (0.5, 2.0),
    long: int = 2048,
    short: int = 512,
    largest_class: float = 0.75,
    flip: bool = True,
) -> Arrays:
    """A random crop of a scene that was resized at random, mirrored half of the time.

    All randomness comes from `rng`, in this order: the ratio; top and left of every crop that is
    tried; then one for the flip, if `flip`.

    Args:
        image: the encoded image.
        annotation: the PNG with the classes.
        size: side S of the crop in pixels.
        rng: source of every draw.
        classes: K.
        scale_range: from where to where the ratio of `resized_size` is uniform.
        long: longer side of the box that an image is resized into, before the ratio.
        short: its shorter side.
        largest_class: what share of a crop's labelled pixels one class must stay below; tried
            CROP_TRIES times. 1: any crop will do.
        flip: mirror left to right with probability 0.5.

    Returns:
        - `image`: uint8 (S, S, 3), RGB, zeros right and below of what is there.
        - `label`: uint8 (S, S), 0 to K - 1 or IGNORED, as all is where nothing is there.
        - `size`: int32 (2,), height and width of what is there.

    Raises:
        UnreadableImage: either does not decode, or they do not belong together.
    """
    pixels, label = _decoded(image, annotation, classes)
    low, high = scale_range
    resized = resized_size(*label.shape, long, short, low + (high - low) * rng.random())
    window, label = _crop(label, resized, size, largest_class, rng)
    pixels = resize_bilinear(pixels, resized, window)
    columns = slice(None, None, -1 if flip and rng.random() < 0.5 else 1)
    height, width = label.shape
    scene = {
        "image": np.zeros((size, size, 3), np.uint8),
        "label": np.full((size, size), IGNORED, np.uint8),
        "size": np.array([height, width], np.int32),
    }
    for channel in range(3):  # five times faster than one copy where it is mirrored
        scene["image"][:height, :width, channel] = pixels[:, columns, channel]
    scene["label"][:height, :width] = label[:, columns]
    return scene


def test_scene(
    image: bytes,
    annotation: bytes,
    *,
    classes: int,
    ratios: tuple[float, ...] = (1.0,),
    long: int = 2048,
    short: int = 512,
) -> Arrays:
    """A scene resized for each of several views, and its labels at their own size.

    Args:
        image: the encoded image.
        annotation: the PNG with the classes.
        classes: K.
        ratios: of `resized_size`, one a view.
        long: longer side of the box that an image is resized into.
        short: its shorter side.

    Returns:
        - `image_0`, `image_1`, ...: uint8 (h, w, 3), RGB, one a ratio.
        - `label`: uint8 (H, W), 0 to K - 1 or IGNORED.

    Raises:
        UnreadableImage: either does not decode, or they do not belong together; `known` has a
            "label" of the size by `scene_size`, if there is one: what the annotation says, and
            otherwise IGNORED.
    """
    pixels, label = _decoded(image, annotation, classes)
    views = {
        f"image_{view}": resize_bilinear(pixels, resized_size(*label.shape, long, short, ratio))
        for view, ratio in enumerate(ratios)
    }
    return views | {"label": label}


test_scene.__test__ = False  # no test of pytest's, whatever its name


def _decoded(image: bytes, annotation: bytes, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (H, W, 3) and labels (H, W)."""
    try:
        label = read_annotation(annotation, classes)
    except UnreadableImage as error:
        size = scene_size(io.BytesIO(image), io.BytesIO(annotation))
        if not error.known and all(size):
            error.known = {"label": np.full(size, IGNORED, np.uint8)}
        raise
    try:
        pixels = decode_rgb(image)
    except UnreadableImage as error:
        error.known = {"label": label}
        raise
    check_size(label, *pixels.shape[:2])
    return pixels, label


def _crop(
    label: np.ndarray, resized: Size, size: int, largest: float, rng: np.random.Generator
) -> tuple[Window, np.ndarray]:
    """A window of the resized scene, at most `size` on each side, and the labels in it.

    After CROP_TRIES that one class fills, the next is taken as it is.
    """
    height, width = (min(length, size) for length in resized)
    for tries in range(CROP_TRIES + 1):
        top, left = (
            int(rng.integers(0, length - part, endpoint=True))
            for length, part in zip(resized, (height, width), strict=True)
        )
        window = top, left, height, width
        part = resize_nearest(label, resized, window)
        if largest >= 1 or tries == CROP_TRIES or _is_mixed(part, largest):
            break
    return window, part


def _is_mixed(label: np.ndarray, largest: float) -> bool:
    """Whether several classes are in it, and the largest has less than that share of them."""
    counts = np.bincount(label.ravel(), minlength=256)[:IGNORED]
    return np.count_nonzero(counts) > 1 and counts.max() / counts.sum() < largest
