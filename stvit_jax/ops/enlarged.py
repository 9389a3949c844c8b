"""What a loss takes of logits that are enlarged to the size of the labels, without writing them.

Enlarged logits are the largest arrays of a step: 157 MB for a picture of 512 x 512 and 150 classes,
of either head, crossing memory a dozen times. Here a pixel's logits are made of the four that it
lies between, wherever they are needed.

The pixels are in `resize.squares`, which takes ratios that are whole and even; beyond the border
they are ignored.

Shapes: B images, h x w logits, K classes, squares of y x x pixels.
"""

import jax
import jax.numpy as jnp

from stvit_jax.ops import resize

IGNORED = 255  # the label of pixels that are of no class


def takes(logits: jax.Array, labels: jax.Array) -> bool:
    """Whether (B, h, w, K) are enlarged to (B, H, W) by whole and even ratios."""
    return resize.in_squares(logits.shape[1:3], labels.shape[1:])


def in_squares(labels: jax.Array, logits: jax.Array) -> jax.Array:
    """Labels (B, H, W) of logits (B, h, w, K) as (B, h + 1, w + 1, y, x)."""
    b, h, w, _ = logits.shape
    y, x = labels.shape[1] // h, labels.shape[2] // w
    around = ((0, 0), (y // 2, y // 2), (x // 2, x // 2))
    labels = jnp.pad(labels, around, constant_values=IGNORED)
    return labels.reshape(b, h + 1, y, w + 1, x).swapaxes(2, 3)


@jax.custom_vjp
def log_probability(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The logarithm of what softmax gives to the label of every pixel, 0 where it is ignored.

    It has a gradient, and no more.

    Args:
      logits: (B, h, w, K), at least float32.
      labels: integers, `in_squares`.

    Returns:
      (B, h + 1, w + 1, y, x), in the dtype of the logits.
    """
    return _forward(logits, labels)[0]


def _forward(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, tuple]:
    # Barriers, so that every sum makes the pixels anew; else they are written, and read.
    given, square = logits, labels.shape[3:]
    largest = jnp.max(resize.squares(logits, square), axis=-1)
    logits, largest = jax.lax.optimization_barrier((logits, largest))
    total = jnp.sum(jnp.exp(resize.squares(logits, square) - largest[..., None]), axis=-1)
    logits, total = jax.lax.optimization_barrier((logits, total))
    target = jnp.sum(
        jnp.where(_is_label(logits, labels), resize.squares(logits, square), 0), axis=-1
    )
    total = largest + jnp.log(total)
    return jnp.where(labels == IGNORED, 0, target - total), (given, labels, total)


def _backward(kept: tuple, dy: jax.Array) -> tuple[jax.Array, None]:
    logits, labels, total = kept
    h, w, square = *logits.shape[1:3], labels.shape[3:]
    dy = jnp.where(labels == IGNORED, 0, dy)[..., None]
    gradient = jnp.zeros_like(logits)
    for i, j, weight in resize.corners(logits, square):
        logits, gradient = jax.lax.optimization_barrier((logits, gradient))
        share = jnp.exp(resize.squares(logits, square) - total[..., None])
        dlogits = jnp.sum(dy * (_is_label(logits, labels) - share) * weight, axis=(3, 4))
        gradient += dlogits[:, 1 - i : h + 1 - i, 1 - j : w + 1 - j]
    return gradient, None


log_probability.defvjp(_forward, _backward)


def answers(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The class with the largest logit of every pixel; arguments and shape as above."""
    logits = jax.lax.stop_gradient(logits)
    return jnp.argmax(
        resize.squares(jax.lax.optimization_barrier(logits), labels.shape[3:]), axis=-1
    )


def _is_label(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Whether a class is that of a pixel; not a gather, whose gradient would be a scatter."""
    return labels[..., None] == jnp.arange(logits.shape[-1], dtype=labels.dtype)
