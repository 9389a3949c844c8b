"""STViT as the backbone of a dense task: which shape does every pixel belong to?

    python -m examples.dense --output PNG [--steps 300]

Pictures of circles, squares and triangles are generated, a head of a few lines is put on the four
feature maps, and both are trained; two minutes on two CPU cores. The picture shows what it says of
new shapes. What to take from it: `feature_maps` gives maps of strides 4, 8, 16 and 32, and sides
that these do not divide are rounded up, as if zeros were added right and bottom.
"""

import argparse
from collections.abc import Iterator, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from PIL import Image, ImageDraw

import stvit_jax

SIZE, BATCH = 64, 16
CLASSES = ("background", "circle", "square", "triangle")
COLOURS = np.array([(40, 40, 40), (230, 159, 0), (86, 180, 233), (0, 158, 115)], np.uint8)


class DenseHead(nn.Module):
    """The four maps, each to `width` channels and to the size of the first, summed."""

    classes: int
    width: int = 64

    @nn.compact
    def __call__(self, maps: list[jax.Array]) -> jax.Array:
        """Logits (B, H/4, W/4, classes)."""
        size = maps[0].shape[1:3]
        x = 0
        for i, features in enumerate(maps):
            y = nn.Dense(self.width, name=f"map_{i}")(features)
            x = x + jax.image.resize(y, (len(y), *size, self.width), "bilinear")
        return nn.Dense(self.classes, name="classify")(nn.gelu(x))


def scenes(seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Endless batches: uint8 images (B, S, S, 3), and the class of every pixel (B, S, S)."""
    rng = np.random.default_rng(seed)
    while True:
        images, labels = [], []
        for _ in range(BATCH):
            noise = rng.integers(0, 80, (SIZE, SIZE, 3), np.uint8)
            image, label = Image.fromarray(noise), Image.new("L", (SIZE, SIZE))
            for kind in rng.permutation([1, 2, 3]):
                x, y, r = *rng.integers(10, SIZE - 10, 2), rng.integers(8, 14)
                colour = tuple(int(c) for c in rng.integers(60, 256, 3))
                for canvas, fill in ((image, colour), (label, int(kind))):
                    draw = ImageDraw.Draw(canvas)
                    if kind == 1:
                        draw.ellipse((x - r, y - r, x + r, y + r), fill)
                    elif kind == 2:
                        draw.rectangle((x - r, y - r, x + r, y + r), fill)
                    else:
                        draw.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill)
            images.append(np.asarray(image))
            labels.append(np.asarray(label))
        yield np.stack(images), np.stack(labels)


def main(argv: Sequence[str] | None = None) -> float:
    """Trains, draws, and returns the share of pixels that are right on new scenes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", required=True)
    parser.add_argument("--steps", type=int, default=300)
    known = parser.parse_args(argv)

    backbone = stvit_jax.create_model("stvit_tiny", features_only=True)
    head = DenseHead(len(CLASSES))
    variables = backbone.init(jax.random.key(0), jnp.zeros((1, SIZE, SIZE, 3)))
    maps = backbone.apply(variables, jnp.zeros((1, SIZE, SIZE, 3)))
    params = {"backbone": variables["params"], "head": head.init(jax.random.key(1), maps)}
    tx = optax.adamw(optax.cosine_decay_schedule(2e-3, known.steps), weight_decay=0.05)

    def logits_of(params, stats, images, train):
        x = stvit_jax.data.normalize(images)
        how = {"mutable": ["batch_stats"], "train": True} if train else {}
        out = backbone.apply({"params": params["backbone"], "batch_stats": stats}, x, **how)
        maps, new = out if train else (out, {"batch_stats": stats})
        logits = head.apply(params["head"], maps)
        shape = (*images.shape[:3], len(CLASSES))
        return jax.image.resize(logits, shape, "bilinear"), new["batch_stats"]

    @jax.jit
    def train_step(params, stats, opt_state, images, labels):
        def loss(params):
            logits, new = logits_of(params, stats, images, True)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), new

        (value, stats), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt_state = tx.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), stats, opt_state, value

    stats, opt_state = variables["batch_stats"], tx.init(params)
    for step, (images, labels) in zip(range(known.steps), scenes(0), strict=False):
        params, stats, opt_state, value = train_step(params, stats, opt_state, images, labels)
        if step % 50 == 0:
            print(f"step {step}: loss {float(value):.3f}", flush=True)

    images, labels = next(scenes(1))
    logits, _ = jax.jit(logits_of, static_argnums=3)(params, stats, images, False)
    said = np.asarray(logits.argmax(-1))
    right = float((said == labels).mean())
    rows = [np.concatenate([images[i], COLOURS[labels[i]], COLOURS[said[i]]], 1) for i in range(6)]
    picture = np.concatenate([np.concatenate(rows[:3], 0), np.concatenate(rows[3:], 0)], 1)
    Image.fromarray(picture).resize((picture.shape[1] * 2, picture.shape[0] * 2), 0).save(
        known.output
    )
    print(f"{known.output}: image, truth, answer; {right:.1%} of new pixels are right")
    return right


if __name__ == "__main__":
    main()
