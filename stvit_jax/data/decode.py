"""Encoded bytes to uint8 crops: everything the host does to an image.

Training is decode, random resized crop and flip; evaluation is decode, resize and centre crop. The
rest of the augmentation runs on the device. The crops are those of timm 0.5.4 and torchvision on
Pillow, and so are the pixels:

- Colour. What Pillow's `convert("RGB")` gives: transparency is dropped, not blended, and EXIF
  orientation is ignored. Departure: grey of more than 8 bits, which `convert` would clip at 255,
  keeps its high byte, as Pillow itself does for 16-bit colour. Where all of its values fit into 8
  or 12 bits, or are floats in 0..1, that is taken for its scale; what would be all but black
  without a known scale is refused.
- JPEG. libjpeg-turbo through simplejpeg, bit-equal to Pillow and faster. Whatever it objects to,
  and whatever is not plain YCbCr or grey, is left to Pillow, which so has the last word on what is
  readable and on the reason given.
- Resizing. Pillow's antialiased bicubic, four times faster: fast_image_resize does the same
  convolution with SIMD. Pillow rounds to 8 bits between its two passes, and the other order of
  passes differs by 0.25 levels on average, so the passes are made one by one, in Pillow's order.
  On platforms that cykooz_resizer has no wheel for (Linux on ARM), Pillow makes the passes. Where
  the evaluation crop is larger than its image, Pillow resizes: there the fast one differs from it
  in half a percent of the values, by up to 2 levels.
"""

import io
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from stvit_jax.data.signatures import image_format, what_else
from stvit_jax.errors import UserError, described, one_line

try:
    import cykooz_resizer as fast
except ImportError:
    fast = None

CROP_AREA = (0.08, 1.0)
CROP_ASPECT = (3 / 4, 4 / 3)  # width / height
CROP_TRIES = 10
SMALL_SIZE = 32  # up to here: no resized crop, but padding (training) or nothing (evaluation)
SMALL_PADDING = 4

# Pillow's own threshold for a decompression bomb. A CMYK image of this size peaks at 1.2 GB.
MAX_PIXELS = 89_478_485
# What image sets hold. Not every format that Pillow knows: EPS, for one, starts another program.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF", "JPEG2000")
MAX_ENLARGED = 16  # times the crop: an enlarged image that is larger is computed for the crop alone

# (width, height) and (left, top, width, height), in pixels.
Pass = tuple[tuple[int, int], tuple[float, float, float, float]]


class UnreadableImage(Exception):
    """Bytes that do not decode to an image. The message is the reason, without the file's name.

    Attributes:
      known: what is known of the example all the same, by its name in the batch.
    """

    known: Mapping[str, Any] = MappingProxyType({})


def crop_share(image_size: int) -> float:
    """The side of the evaluation crop as a share of the short side that an image is resized to."""
    return 224 / 256 if SMALL_SIZE < image_size <= 224 else 1.0


def short_side(image_size: int) -> int | None:
    """What an image's short side is resized to before the crop; None: all of it to the square."""
    return None if image_size <= SMALL_SIZE else int(image_size / crop_share(image_size))


def eval_image(data: bytes, image_size: int) -> np.ndarray:
    """Decode an image and cut the evaluation crop.

    Up to 224 the short side is resized to 256/224 of the crop, above that to the crop itself. Up
    to 32 the whole image is resized to the square, if it is not that size already.

    Args:
        data: the encoded image.
        image_size: side S of the crop in pixels.

    Returns:
        uint8 (S, S, 3), RGB.

    Raises:
        UnreadableImage: `data` is no image, is damaged, or is too large.
        UserError: `data` is something else than bytes, or the size no positive integer.
    """
    if not isinstance(data, bytes | bytearray | memoryview):
        kind = type(data).__name__
        raise UserError(f"data is of type {kind}: give the bytes of an image's file")
    if not isinstance(image_size, int | np.integer) or image_size < 1:
        raise UserError(f"image_size is {one_line(image_size)}: give a positive number of pixels")
    pixels = decode_rgb(data)
    height, width = pixels.shape[:2]
    short = short_side(image_size)
    if short is None:
        size = (image_size, image_size)
    elif width <= height:
        size = (short * height // width, short)
    else:
        size = (short, short * width // height)
    enlarges = size[0] > height or size[1] > width
    if enlarges and size[0] * size[1] <= MAX_ENLARGED * image_size**2:
        image = Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BICUBIC)
        top, left = (round((length - image_size) / 2) for length in size)
        return np.asarray(image.crop((left, top, left + image_size, top + image_size)))
    return _resize_and_crop(pixels, size, image_size)


def train_image(data: bytes, image_size: int, rng: np.random.Generator, flip: bool) -> np.ndarray:
    """Decode an image and cut the training crop, mirrored half of the time.

    Above 32 pixels the crop is that of `sample_crop`, resized to the square. Up to 32 the image
    (resized to the square, if it is not that size already) is padded with 4 black pixels on each
    side and cropped at a uniform offset.

    All randomness comes from `rng`, in this order: the draws of `sample_crop` or, up to 32 pixels,
    top and left; then one for the flip, if `flip`.

    Args:
        data: the encoded image.
        image_size: side S of the crop in pixels.
        rng: source of every draw.
        flip: mirror left to right with probability 0.5.

    Returns:
        uint8 (S, S, 3), RGB.

    Raises:
        UnreadableImage: `data` is no image, is damaged, or is too large.
    """
    pixels = decode_rgb(data)
    square = (image_size, image_size)
    if image_size <= SMALL_SIZE:
        border = (SMALL_PADDING, SMALL_PADDING)
        padded = np.pad(_resize_and_crop(pixels, square, image_size), (border, border, (0, 0)))
        top = rng.integers(0, 2 * SMALL_PADDING, endpoint=True)
        left = rng.integers(0, 2 * SMALL_PADDING, endpoint=True)
        crop = padded[top : top + image_size, left : left + image_size]
    else:
        top, left, height, width = sample_crop(*pixels.shape[:2], rng)
        crop = pixels[top : top + height, left : left + width]
        crop = _resize_and_crop(crop, square, image_size)
    if flip and rng.random() < 0.5:
        mirrored = np.empty_like(crop, order="C")
        for channel in range(3):  # five times faster than one copy of crop[:, ::-1]
            mirrored[..., channel] = crop[:, ::-1, channel]
        return mirrored
    return np.array(crop)


def sample_crop(height: int, width: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Draw the box of a random resized crop (timm 0.5.4 `RandomResizedCropAndInterpolation`).

    Draws, per try: area, logarithm of the aspect ratio and, if the box fits, top and left. When no
    try fits: the largest centred box of the image's own aspect ratio, clamped to 3/4..4/3.

    Args:
        height: of the image in pixels, at least 1.
        width: of the image in pixels, at least 1.
        rng: source of every draw.

    Returns:
        (top, left, box height, box width) in pixels, within the image and not empty. (timm can
        draw an empty box in an image of a few pixels, and fails then.)
    """
    low, high = CROP_ASPECT
    for _ in range(CROP_TRIES):
        area = rng.uniform(*CROP_AREA) * height * width
        aspect = math.exp(rng.uniform(math.log(low), math.log(high)))
        box_width = round(math.sqrt(area * aspect))
        box_height = round(math.sqrt(area / aspect))
        if 0 < box_width <= width and 0 < box_height <= height:
            top = int(rng.integers(0, height - box_height, endpoint=True))
            left = int(rng.integers(0, width - box_width, endpoint=True))
            return top, left, box_height, box_width
    box_width = min(width, round(height * high))
    box_height = min(height, round(width / low))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def decode_rgb(data: bytes) -> np.ndarray:
    """Decode any of FORMATS to uint8 (H, W, 3), RGB, or raise UnreadableImage."""
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        if colorspace in ("YCbCr", "Gray") and height * width <= MAX_PIXELS:
            return simplejpeg.decode_jpeg(data, colorspace="RGB")
    except ValueError:
        pass  # Not a JPEG, or one with a defect, which Pillow may tolerate or name.
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise UnreadableImage(
                    f"{image.width} x {image.height} pixels are more than {MAX_PIXELS}"
                )
            deep = _is_deep_colour(image)  # what is not known any more after `load`
            image.load()
            # `convert` would warn about transparency that it drops anyway.
            image.info.pop("transparency", None)
            if image.mode[0] in "IF":  # I;16 and kin; PGM and TIFF also come as 32-bit I, or floats
                return np.repeat(_grey_levels(np.asarray(image))[..., None], 3, axis=-1)
            pixels = np.asarray(image.convert("RGB"))
    except UnreadableImage:
        raise
    except UnidentifiedImageError:
        # Pillow's message names a Python object, not the cause.
        if form := image_format(data):
            reason = f": it starts as {form}, and is damaged or of a kind that is not read"
        else:
            reason = f", but {what_else(data)}"
        raise UnreadableImage(f"no image that can be read{reason}") from None
    except Exception as error:  # Pillow's decoders raise a dozen different types.
        raise UnreadableImage(described(error)) from error
    if deep and pixels.max() <= 16:  # nothing above 12 bits; Pillow rounds some formats up
        raise UnreadableImage("16-bit colour that would be all but black: write it with 8 bits")
    return pixels


def _is_deep_colour(image: Image.Image) -> bool:
    """Whether colour comes with 16 bits, of which Pillow keeps the upper 8."""
    if not image.mode.startswith("RGB") or not image.tile:
        return False
    args = image.tile[0].args  # the raw mode, such as RGB;16B; of PPM, also the largest value
    return ";16" in str(args) or (
        image.format == "PPM" and not isinstance(args, str) and args[-1] > 255
    )


def _grey_levels(values: np.ndarray) -> np.ndarray:
    """Grey of other types than uint8 to uint8, by the scale that its range tells."""
    low, high = values.min(), values.max()
    if values.dtype.kind == "f":
        if low >= -0.001 and high <= 1.001:  # resizing rings
            return np.rint(255 * values.clip(0, 1)).astype(np.uint8)
        if low >= 0 and 2 <= high <= 255:
            return values.astype(np.uint8)
    elif low >= 0:
        for bits in (8, 12, 16):
            if high < 2**bits:
                return (values >> (bits - 8)).astype(np.uint8)
    raise UnreadableImage(
        f"grey values from {low:g} to {high:g}, of which none is known to be white: write it with "
        "8 bits"
    )


def _resize_and_crop(pixels: np.ndarray, size: tuple[int, int], crop: int) -> np.ndarray:
    """Resize to `size` (height, width) and cut out the centred square of side `crop`.

    Only what the square needs is computed, so that memory stays bounded for any shape of image.
    """
    height, width = pixels.shape[:2]
    rows, top, box_height = _source_span(height, size[0], crop)
    columns, left, box_width = _source_span(width, size[1], crop)
    pixels = pixels[rows, columns]
    used_height, used_width = pixels.shape[:2]
    # Pillow 13. Earlier versions always begin with the horizontal pass.
    if height - size[0] > 2 * max(0, width - size[1]):
        vertical = (used_width, crop), (0, top, used_width, box_height)
        horizontal = (crop, crop), (left, 0, box_width, crop)
        return _bicubic(pixels, (vertical, horizontal))
    horizontal = (crop, used_height), (left, 0, box_width, used_height)
    vertical = (crop, crop), (0, top, crop, box_height)
    return _bicubic(pixels, (horizontal, vertical))


def _source_span(length: int, resized: int, crop: int) -> tuple[slice, float, float]:
    """What the centred `crop` pixels of an axis of `length`, once `resized`, are computed from.

    Returns:
        the source pixels that the bicubic kernel reaches, and where in them the crop starts and
        how long it is, in source pixels.
    """
    scale = length / resized
    start = round((resized - crop) / 2) * scale
    reach = 2 * max(1.0, scale) + 1
    first = max(0, math.floor(start - reach))
    last = min(length, math.ceil(start + crop * scale + reach))
    offset = start - first
    return slice(first, last), offset, min(crop * scale, last - first - offset)


def _bicubic(pixels: np.ndarray, passes: tuple[Pass, ...]) -> np.ndarray:
    """Resize uint8 (H, W, 3) pass by pass, rounding to 8 bits after each.

    A pass is the size of its result and the box of its input that becomes it. As Pillow's, the
    kernel (a = -0.5, widened when shrinking) also reads the pixels around the box.
    """
    if fast is None:
        image = Image.fromarray(pixels)
        for size, (left, top, width, height) in passes:
            box = (left, top, left + width, top + height)
            image = image.resize(size, Image.Resampling.BICUBIC, box)
        return np.asarray(image)
    height, width = pixels.shape[:2]
    image = fast.ImageData(width, height, fast.PixelType.U8x3, pixels.tobytes())
    kernel = fast.ResizeAlg.convolution(fast.FilterType.catmull_rom)
    resizer = fast.Resizer()  # not shared: it holds a lock while it works
    for size, box in passes:
        options = fast.ResizeOptions(kernel, crop_box=fast.CropBox(*box))
        source, image = image, fast.ImageData(*size, fast.PixelType.U8x3)
        resizer.resize(source, image, options)
    return np.frombuffer(image.get_buffer(), np.uint8).reshape(image.height, image.width, 3)
