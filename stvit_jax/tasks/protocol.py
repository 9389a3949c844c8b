"""How a segmenter is asked about a whole picture, as in the papers: views, windows, their mean.

A view is the picture at one scale. Whole, the network sees all of it; sliding, windows of the size
that it was trained on, whose logits are averaged where they overlap. Logits are brought to the
picture's own size; of several views, their probabilities are averaged there (mmsegmentation 0.x).

Shapes: B pictures, h x w pixels of a view, K classes.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from stvit_jax.ops import resize

Apply = Callable[[jax.Array], jax.Array]  # normalised (B, h, w, 3) to logits (B, h, w, K)


@dataclasses.dataclass(frozen=True)
class Protocol:
    """A way to test.

    Attributes:
      scales: of the views.
      flip: whether every view is seen mirrored, too.
      window: side of the windows that slide, in pixels; 0: whole views.
    """

    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    window: int = 0

    def scores(
        self, apply: Apply, views: Sequence[jax.Array], sizes: jax.Array, size: resize.Size
    ) -> jax.Array:
        """What the classes of each pixel are compared by: the largest is the answer.

        Args:
          apply: the network.
          views: one a scale, normalised, (B, h, w, 3).
          sizes: integers (B, 2): height and width of each picture itself.
          size: of the result, at least as large as any.

        Returns:
          (B, *size, K), of which the first rows and columns by `sizes` are meant: logits of a
          single view, otherwise mean probabilities.
        """
        if self.window:
            apply = sliding(apply, self.window)
        several = len(views) > 1 or self.flip
        total = 0.0
        for view in views:
            for mirrored in (False, True) if self.flip else (False,):
                logits = apply(view[:, :, ::-1] if mirrored else view)
                logits = logits[:, :, ::-1] if mirrored else logits
                logits = resize.bilinear_each(logits, sizes, size)
                total += jax.nn.softmax(logits) if several else logits
        return total / (len(views) * (1 + self.flip))


def sliding(apply: Apply, window: int) -> Apply:
    """The network on windows, a third of which overlap, in place of the whole.

    The last of a row or column ends with the picture; a side that is shorter than a window is
    taken as it is.
    """

    def logits(images: jax.Array) -> jax.Array:
        height, width = images.shape[1:3]
        tops, lefts = starts(height, window), starts(width, window)
        side = min(height, window), min(width, window)
        corners = np.array([(top, left) for top in tops for left in lefts])
        count = np.zeros((height, width, 1))
        for top, left in corners:
            count[top : top + side[0], left : left + side[1]] += 1

        def add(total: jax.Array, corner: jax.Array) -> tuple[jax.Array, None]:
            at = (0, *corner, 0)
            part = jax.lax.dynamic_slice(images, at, (len(images), *side, images.shape[-1]))
            part = apply(part)
            held = jax.lax.dynamic_slice(total, at, part.shape)
            return jax.lax.dynamic_update_slice(total, held + part, at), None

        of_one = jax.eval_shape(apply, jax.ShapeDtypeStruct((len(images), *side, 3), images.dtype))
        zeros = jnp.zeros((len(images), height, width, of_one.shape[-1]), of_one.dtype)
        total, _ = jax.lax.scan(add, zeros, jnp.asarray(corners))
        return total / count.astype(of_one.dtype)

    return logits


def starts(length: int, window: int) -> list[int]:
    """Where windows begin along a side of `length` pixels: two thirds of one apart."""
    stride = window * 2 // 3
    count = max(length - window + stride - 1, 0) // stride + 1
    return [max(min(i * stride, length - window), 0) for i in range(count)]
