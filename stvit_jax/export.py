"""A trained network as one file that runs without this package: pictures in, logits out.

    python -m stvit_jax.export --weights PATH --output FILE

FILE, which is not there yet, is a program of `jax.export` for CPU, NVIDIA GPU and TPU, or, where it
ends in .onnx, an ONNX model (`pip install 'jax2onnx<0.14' onnxruntime`). It takes uint8 crops
(B, S, S, 3), RGB, any number of them; weights and normalisation are inside, and the file says how
pictures become crops, and what the classes are. `examples/run_exported.py` runs the first. PATH is
of any form that `init_from` takes; of a segmenter, crops are windows of a picture, and logits are
(B, S, S, K), of every pixel.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from stvit_jax import command_line
from stvit_jax.checkpoints import files
from stvit_jax.checkpoints.trained import load_trained
from stvit_jax.console import say
from stvit_jax.errors import UserError, reason
from stvit_jax.inference import network
from stvit_jax.portable import onnx_file, program
from stvit_jax.portable.metadata import metadata

TOLERANCE = 1e-4  # of the largest logit, in float32


def export(weights: str, output: Path, *, ema: bool = False, image_size: int | None = None) -> str:
    """Writes a file whose contents were loaded and run beside the network.

    Args:
      weights: see `load_trained`.
      output: the file to write.
      ema: the moving average in place of the raw weights.
      image_size: side of the crops in pixels; None: as trained.

    Returns:
      What was written and how far it is from the network, in words.

    Raises:
      UserError: of the weights; or the file cannot be written, or does not agree.
    """
    files.make_folder_of(output)  # what cannot be written should fail before the work
    trained = load_trained(weights, ema, kernels="plain")
    size = image_size or trained.image_size
    logits, variables = network(trained)
    constants = jax.tree.map(np.asarray, variables)
    form = onnx_file if output.suffix.lower() == ".onnx" else program
    content = form.dumps(lambda images: logits(constants, images), size, metadata(trained, size))
    compiled = jax.jit(logits)
    far = _compare(form.loads(content), lambda images: compiled(variables, images), size)
    with files.replaced(output) as file:
        file.write(content)
    megabytes = len(content) / 1e6
    return (
        f"{trained.settings['name']} of {trained.source} for {size} x {size} pixels: {output}, "
        f"{megabytes:.1f} MB; logits of random pictures are within {far:.1e} of the network's"
    )


def _compare(
    ours: Callable[[np.ndarray], jax.Array], theirs: Callable[[np.ndarray], jax.Array], size: int
) -> float:
    """The largest difference on random pictures, three and one of them, of the largest logit."""
    images = np.random.default_rng(0).integers(0, 256, (3, size, size, 3), np.uint8)
    expected = np.asarray(theirs(images))
    logits = np.concatenate([ours(images), ours(images[:1])])
    difference = np.abs(logits - np.concatenate([expected, expected[:1]])).max()
    difference = float(difference / np.abs(expected).max())
    if not difference <= TOLERANCE:
        raise UserError(
            f"the exported network differs from the network by {difference:.1e} of the largest "
            f"logit, more than {TOLERANCE:.0e}: it was not written; please report it"
        )
    return difference


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = command_line.parser("python -m stvit_jax.export", __doc__)
    parser.add_argument("--weights", required=True, metavar="PATH")
    parser.add_argument("--output", required=True, metavar="FILE")
    parser.add_argument("--ema", action="store_true", help="take the moving average")
    parser.add_argument("--image-size", type=int, help="pixels, square; by default as trained")
    args = parser.parse_args(argv)
    if args.image_size is not None and args.image_size < 1:
        raise UserError(f"--image-size is {args.image_size}; it must be at least 1")
    output = command_line.local_path("--output", args.output)
    if os.path.lexists(output):
        raise UserError(f"{output} exists; remove it, or choose another output")
    try:
        said = export(args.weights, output, ema=args.ema, image_size=args.image_size)
    except OSError as error:
        raise UserError(f"{output} cannot be written: {reason(error)}") from error
    say(said)


if __name__ == "__main__":
    command_line.entry(main)
