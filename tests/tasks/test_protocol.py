"""Testing of whole pictures next to the same written down with PyTorch, window by window."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from stvit_jax.tasks.protocol import Protocol, starts

K = 4
KERNEL = np.random.default_rng(1).normal(size=(5, 5, 3, K))
SIZES = [(37, 52), (40, 41)]  # of two pictures, whose views have one size
VIEWS = {1.0: (33, 44), 0.5: (17, 22), 1.5: (49, 66)}
LABELS = (48, 64)


def network(images):
    """Stands for a network: it sees five pixels around, and how large its input is."""
    maps = jax.lax.conv_general_dilated(
        images, jnp.asarray(KERNEL), (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return jnp.tanh(maps) * images.shape[1] + jnp.mean(images)


def peer(images):
    maps = F.conv2d(images, torch.from_numpy(KERNEL).permute(3, 2, 0, 1), padding=2)
    return torch.tanh(maps) * images.shape[2] + images.mean()


def slid(images, window):
    """As mmsegmentation's facts say it, with the stride of its configs."""
    height, width = images.shape[2:]
    stride = {24: 16, 512: 341}[window]
    total = torch.zeros(1, K, height, width, dtype=images.dtype)
    count = torch.zeros(1, 1, height, width, dtype=images.dtype)
    for row in range(max(height - window + stride - 1, 0) // stride + 1):
        for column in range(max(width - window + stride - 1, 0) // stride + 1):
            bottom, right = min(row * stride + window, height), min(column * stride + window, width)
            top, left = max(bottom - window, 0), max(right - window, 0)
            total[:, :, top:bottom, left:right] += peer(images[:, :, top:bottom, left:right])
            count[:, :, top:bottom, left:right] += 1
    return total / count


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "scales, flip, window",
    [((1.0,), False, 0), ((1.0,), False, 24), ((0.5, 1.0, 1.5), True, 0), ((1.0, 1.5), True, 24)],
)
def test_pictures_are_asked_about_as_the_papers_did(scales, flip, window):
    rng = np.random.default_rng(0)
    # One network sees both pictures, whose mean is another than that of each: one at a time.
    views = [rng.normal(size=(2, *VIEWS[scale], 3)) for scale in scales]
    protocol = Protocol(scales, flip, window)

    @jax.jit
    def ours(views, sizes):
        return protocol.scores(network, views, sizes, LABELS)

    for i, (height, width) in enumerate(SIZES):
        scores = ours([view[i : i + 1] for view in views], np.array([SIZES[i]]))
        expected = []
        for view in views:
            for mirrored in (False, True)[: 1 + flip]:
                x = torch.from_numpy(view[i : i + 1]).permute(0, 3, 1, 2)
                x = x.flip(3) if mirrored else x
                logits = slid(x, window) if window else peer(x)
                how = dict(size=(height, width), mode="bilinear", align_corners=False)
                logits = F.interpolate(logits, **how)
                logits = logits.flip(3) if mirrored else logits
                expected.append(logits.softmax(1) if len(views) > 1 or flip else logits)
        expected = sum(expected) / len(expected)
        expected = expected.permute(0, 2, 3, 1).numpy()
        np.testing.assert_allclose(scores[:, :height, :width], expected, rtol=0, atol=1e-10)


def test_windows_are_those_of_the_papers():
    assert starts(683, 512) == [0, 171] and starts(512, 512) == [0] and starts(300, 512) == [0]
    assert starts(2048, 512) == [0, 341, 682, 1023, 1364, 1536]
    assert starts(1000, 640) == [0, 360] and starts(1493, 640) == [0, 426, 852, 853]
