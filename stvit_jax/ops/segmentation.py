"""What is computed of classes of pixels: the loss, and the counts behind mIoU.

By the rules of mmsegmentation 1.2.2, that all papers' numbers come from.

Shapes: B images, H x W pixels, K classes.
"""

import jax
import jax.numpy as jnp
import numpy as np

from stvit_jax.ops import enlarged, resize
from stvit_jax.ops.enlarged import IGNORED
from stvit_jax.ops.precision import wide

# What mmsegmentation adds to a divisor: a number of Python's, so that float64 keeps it.
_EPSILON = float(np.finfo(np.float32).eps)


def cross_entropy(
    logits: jax.Array, labels: jax.Array, *, mean_of_labelled: bool = False
) -> jax.Array:
    """The pixels' mean cross-entropy, a scalar in at least float32.

    Args:
      logits: (B, h, w, K), of any size: they are enlarged to the labels', bilinearly.
      labels: integers (B, H, W), classes or `IGNORED`, which has no loss.
      mean_of_labelled: the sum is divided by the number of pixels that are not ignored; by default
        by that of all, as in the papers' runs.
    """
    logits = logits.astype(wide(logits.dtype))
    if enlarged.takes(logits, labels):
        gain = enlarged.log_probability(logits, enlarged.in_squares(labels, logits))
    else:
        gain = _log_probability(resize.bilinear(logits, labels.shape[1:]), labels)
    pixels = jnp.sum(labels != IGNORED) if mean_of_labelled else labels.size
    return -jnp.sum(gain) / (pixels + _EPSILON)


def _log_probability(logits: jax.Array, labels: jax.Array) -> jax.Array:
    kept = labels != IGNORED
    index = jnp.where(kept, labels, 0).astype(jnp.int32)[..., None]
    target = jnp.take_along_axis(logits, index, axis=-1)[..., 0]
    return jnp.where(kept, target - jax.nn.logsumexp(logits, axis=-1), 0)


def accuracy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The share of pixels that are right, of those that are not ignored; arguments as above."""
    logits = logits.astype(wide(logits.dtype))
    if enlarged.takes(logits, labels):
        labels = enlarged.in_squares(labels, logits)
        answers = enlarged.answers(logits, labels)
    else:
        answers = jnp.argmax(resize.bilinear(logits, labels.shape[1:]), axis=-1)
    kept = labels != IGNORED
    right = kept & (answers == labels)
    return jnp.sum(right) / (jnp.sum(kept) + _EPSILON)


def confusion(predicted: jax.Array, labels: jax.Array, classes: int) -> jax.Array:
    """Exact counts of pixels by label and prediction.

    Args:
      predicted: integers, any shape, in 0 to K - 1, or K where there is no answer.
      labels: integers, likewise, or `IGNORED`, which counts nowhere.
      classes: K.

    Returns:
      (K, K + 1) int32, rows by label: fewer than 2**31 pixels at once. More are added up on the
      host.
    """
    size = classes * (classes + 1)
    index = labels.astype(jnp.int32) * (classes + 1) + predicted.astype(jnp.int32)
    index = jnp.where(labels == IGNORED, size, index)
    counts = jnp.zeros(size, jnp.int32).at[index.ravel()].add(1, mode="drop")
    return counts.reshape(classes, classes + 1)


def scores(counts: np.ndarray) -> dict[str, float]:
    """The measures of a whole set, 0 to 1; on the host.

    Args:
      counts: (K, K + 1) integers: the sum of `confusion` over the set.

    Returns:
      `miou`, the mean of intersection / union over the classes that are labelled or predicted
      anywhere; `aacc`, the share of pixels that are right; `macc`, the mean of that share over the
      classes that are labelled. Not a number where there is nothing to divide by.
    """
    counts = np.asarray(counts, np.int64)
    right, labelled, predicted = np.diag(counts), counts.sum(1), counts.sum(0)[:-1]
    union = labelled + predicted - right
    return {
        "miou": _mean(right[union > 0] / union[union > 0]),
        "aacc": float(right.sum() / labelled.sum()) if labelled.any() else float("nan"),
        "macc": _mean(right[labelled > 0] / labelled[labelled > 0]),
    }


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else float("nan")
