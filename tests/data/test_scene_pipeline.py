"""Scenes to arrays: OpenCV's numbers, windows that are crops of the whole, and what is drawn."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stvit_jax.data.annotations import IGNORED, WrongAnnotation, read_annotation
from stvit_jax.data.cv2_resize import resize_bilinear, resize_nearest
from stvit_jax.data.decode import UnreadableImage
from stvit_jax.data.order import image_rng
from stvit_jax.data.scenes import resized_size, test_scene, train_scene

GOLDEN = Path(__file__).parents[1] / "golden/segmentation_transforms.npz"


def png(pixels: np.ndarray, **how: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", **how)
    return file.getvalue()


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def patches(height: int, width: int, classes: int = 4) -> np.ndarray:
    """Values of an annotation that change every seven pixels or so."""
    values = np.random.default_rng(1).integers(0, classes + 1, (height // 7 + 1, width // 7 + 1))
    return values.repeat(7, 0).repeat(7, 1)[:height, :width].astype(np.uint8)


# Resizing


def test_resizing_is_opencvs() -> None:
    with np.load(GOLDEN) as file:
        image, label = file["resize_src"], file["label_src"]
        seen = 0
        for name in file.files:
            if (kind := name[:5]) not in ("resiz", "label") or name.endswith("_src"):
                continue
            width, height = (int(part[1:]) for part in name.split("_")[1:])
            if kind == "resiz":
                found = resize_bilinear(image, (height, width))
            else:
                found = resize_nearest(label, (height, width))
            assert found.dtype == np.uint8
            np.testing.assert_array_equal(found, file[name], err_msg=name)
            seen += 1
    assert seen == 8


def test_a_window_is_a_crop_of_the_whole() -> None:
    rng = np.random.default_rng(0)
    for seed in range(60):
        # As 1 x 1, and more pixels across than are computed at a time.
        n_in, n_out = rng.integers(1, 90, 2), rng.integers(1, 90, 2)
        if seed % 20 == 0:
            n_in, n_out = np.array([[1, 1], [9, 40_000]])[rng.permutation(2)]
        image, size = noise(*n_in, seed), (int(n_out[0]), int(n_out[1]))
        top, left = (int(rng.integers(0, n)) for n in size)
        height, width = (
            int(rng.integers(1, n - at + 1)) for n, at in zip(size, (top, left), strict=True)
        )
        window = top, left, height, width
        crop = np.s_[top : top + height, left : left + width]
        np.testing.assert_array_equal(
            resize_bilinear(image, size, window), resize_bilinear(image, size)[crop]
        )
        np.testing.assert_array_equal(
            resize_nearest(image[..., 0], size, window), resize_nearest(image[..., 0], size)[crop]
        )


@pytest.mark.parametrize(
    "size, box, expected",
    [
        ((683, 512), (2048, 512, 1.0), (683, 512)),
        ((256, 341), (2048, 512, 1.0), (512, 682)),
        ((341, 256), (2048, 512, 1.0), (682, 512)),
        ((300, 3000), (2048, 512, 1.0), (205, 2048)),  # the long side decides
        ((683, 512), (2048, 512, 0.7531), (514, 385)),  # int(385.58) = 385
        ((4000, 1), (64, 16, 1.0), (64, 1)),  # OpenCV refuses what would be empty
    ],
)
def test_sizes_that_fit_into_a_box(size: tuple, box: tuple, expected: tuple) -> None:
    assert resized_size(*size, *box) == expected


# Annotations


def test_zero_and_255_are_ignored_and_the_rest_counts_from_one() -> None:
    values = np.array([[0, 1, 2, 150, 255]], np.uint8)
    label = read_annotation(png(values), 150)
    assert label.dtype == np.uint8 and label.tolist() == [[255, 0, 1, 149, 255]]
    palette = Image.fromarray(values)
    palette.putpalette(noise(256, 1).ravel().tolist())
    file = io.BytesIO()
    palette.save(file, "PNG")
    assert read_annotation(file.getvalue(), 150).tolist() == label.tolist()
    every = np.arange(255, dtype=np.uint8)[None]
    assert read_annotation(png(every), 254).tolist() == [[255, *range(254)]]


def test_values_written_with_few_bits_are_the_same() -> None:
    """As optimisers of PNG files write them; Pillow would spread the grey ones over 0..255."""
    assert read_annotation(png(np.array([[True, False]])), 2).tolist() == [[0, 255]]
    import struct
    import zlib

    for bits in (2, 4):
        rows = zlib.compress(bytes([0, (1 << (8 - bits)) | (3 << (8 - 2 * bits))]))
        chunks = (
            (b"IHDR", struct.pack(">IIBBBBB", 2, 1, bits, 0, 0, 0, 0)),
            (b"IDAT", rows),
            (b"IEND", b""),
        )
        data = b"\x89PNG\r\n\x1a\n" + b"".join(
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
            for kind, body in chunks
        )
        assert read_annotation(data, 3).tolist() == [[0, 2]], bits


def test_what_is_no_annotation_says_so() -> None:
    wrong = {
        "mode RGB": png(noise(3, 4)),
        "mode I;16": png(np.ones((3, 4), np.uint16)),
        "but 5, 254": png(np.array([[0, 1, 4, 5], [254, 5, 255, 1]], np.uint8)),
    }
    for words, data in wrong.items():
        with pytest.raises(WrongAnnotation, match=words) as raised:
            read_annotation(data, 4)
        assert (raised.value.known["label"] == IGNORED).all()
    whole = png(patches(40, 40))
    for data, words in ((whole[: len(whole) // 2], "cannot be read"), (b"", "an empty file")):
        with pytest.raises(UnreadableImage, match=words) as raised:
            read_annotation(data, 4)
        assert not isinstance(raised.value, WrongAnnotation)


# Training


def train(seed: int, height: int, width: int, **how: object) -> dict[str, np.ndarray]:
    """A crop of 64 from a noisy scene."""
    options = {"size": 64, "rng": image_rng(0, 0, seed, 0), "classes": 4, "long": 256, "short": 64}
    scene = png(noise(height, width)), png(patches(height, width))
    return train_scene(*scene, **(options | how))


def test_a_training_crop_is_that_of_the_resized_scene() -> None:
    image, values = noise(83, 59), patches(83, 59)
    label = read_annotation(png(values), 4)
    flips, ratios = 0, []
    for seed in range(40):
        out = train(seed, 83, 59)
        rng = image_rng(0, 0, seed, 0)  # the documented order of draws
        ratio = 0.5 + 1.5 * rng.random()
        ratios.append(ratio)
        size = resized_size(83, 59, 256, 64, ratio)
        whole, labels = resize_bilinear(image, size), resize_nearest(label, size)
        height, width = min(size[0], 64), min(size[1], 64)
        for tries in range(11):
            top = rng.integers(0, size[0] - height, endpoint=True)
            left = rng.integers(0, size[1] - width, endpoint=True)
            crop = np.s_[top : top + height, left : left + width]
            counts = np.unique(labels[crop][labels[crop] != 255], return_counts=True)[1]
            if tries == 10 or (len(counts) > 1 and counts.max() / counts.sum() < 0.75):
                break
        mirror = -1 if rng.random() < 0.5 else 1
        flips += mirror == -1
        assert out["size"].tolist() == [height, width] and out["size"].dtype == np.int32
        np.testing.assert_array_equal(out["image"][:height, :width], whole[crop][:, ::mirror])
        np.testing.assert_array_equal(out["label"][:height, :width], labels[crop][:, ::mirror])
        assert not out["image"][height:].any() and not out["image"][:, width:].any()
        assert (out["label"][height:] == 255).all() and (out["label"][:, width:] == 255).all()
    assert 10 < flips < 30 and min(ratios) < 0.6 and max(ratios) > 1.9


def test_crops_that_one_class_fills_are_tried_again() -> None:
    """A scene of one class, but for a corner: most crops of it are refused, and then one fits."""
    values = np.ones((64, 256), np.uint8)
    values[:, :40] = 2
    scene = png(noise(64, 256)), png(values)
    how = {"classes": 2, "scale_range": (1.0, 1.0), "long": 256, "short": 64, "flip": False}

    def mixed(largest: float) -> float:
        shares = []
        for seed in range(60):
            out = train_scene(*scene, 64, image_rng(0, 0, seed, 0), largest_class=largest, **how)
            counts = np.bincount(out["label"].ravel(), minlength=2)[:2]
            shares.append(counts.max() / counts.sum() < 0.75)
        return np.mean(shares)

    assert mixed(1.0) < 0.25 and mixed(0.75) > 0.7
    ignored = png(np.zeros((64, 256), np.uint8))
    out = train_scene(scene[0], ignored, 64, image_rng(0, 0, 0, 0), largest_class=0.75, **how)
    assert (out["label"] == IGNORED).all()


def test_no_flip_and_no_scale_leave_a_scene_that_fits_as_it_is() -> None:
    out = train(0, 64, 50, flip=False, long=64, short=50, scale_range=(1.0, 1.0))
    np.testing.assert_array_equal(out["image"][:, :50], noise(64, 50))
    assert out["size"].tolist() == [64, 50]


# Evaluation


def test_views_are_resized_and_labels_are_not() -> None:
    scene = png(noise(37, 53)), png(patches(37, 53))
    out = test_scene(*scene, classes=4, ratios=(0.5, 1.0, 1.75), long=256, short=64)
    assert list(out) == ["image_0", "image_1", "image_2", "label"]
    for view, size in enumerate([(32, 46), (64, 92), (112, 160)]):
        np.testing.assert_array_equal(out[f"image_{view}"], resize_bilinear(noise(37, 53), size))
    np.testing.assert_array_equal(out["label"], read_annotation(scene[1], 4))


def test_of_what_cannot_be_read_the_label_is_known() -> None:
    """Pixels of an unreadable image count as wrong; without labels there are none to count."""
    image, annotation = png(noise(30, 20)), png(patches(30, 20))
    label = read_annotation(annotation, 4)
    nothing = np.full((30, 20), IGNORED, np.uint8)
    cases = [
        (image[:500], annotation, label),
        (b"no image", annotation, label),
        (png(noise(20, 30)), annotation, label),
        (image, annotation[:60], nothing),
        (image, b"", nothing),
        (image, png(noise(30, 20)), nothing),
        (image, png(np.full((30, 20), 9, np.uint8)), nothing),
        (b"no image", b"no annotation", None),
    ]
    for *scene, known in cases:
        with pytest.raises(UnreadableImage) as raised:
            test_scene(*scene, classes=4)
        if known is None:
            assert not raised.value.known
        else:
            np.testing.assert_array_equal(raised.value.known["label"], known)
        with pytest.raises(UnreadableImage):
            train_scene(*scene, 64, image_rng(0, 0, 0, 0), classes=4)
    with pytest.raises(WrongAnnotation, match="20 x 30 pixels, the image 30 x 20"):
        test_scene(png(noise(20, 30)), annotation, classes=4)
