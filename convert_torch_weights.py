"""Converts weights between PyTorch and this project, and shows what was taken, left and written.

    python convert_torch_weights.py INPUT --output OUTPUT [--model NAME] [--ema] [--verify]
    python convert_torch_weights.py INPUT --output OUTPUT --pretrained [--image_size N]
        [--license NAME]

INPUT and OUTPUT may lie in a bucket (gs://BUCKET/PATH).

INPUT is a file of torch.save (.pth, .pt, .bin, .ckpt) or .safetensors, with PyTorch names; a folder
that holds `model.safetensors` or `pytorch_model.bin`, or an index of its shards; a directory that
this program wrote; the workdir of a run; or hf_hub:OWNER/NAME[@REVISION]. What was put round the
names (`module.`, `_orig_mod.`, `model.`, `backbone.`) is taken off, and a head that is missing is
initialised anew; both are said. A segmenter has mmsegmentation's names, `backbone.`, `decode_head.`
and others, and is recognised by them.

OUTPUT ends in .pth, .pt, .bin or .ckpt (the published code loads `model` of it with strict=True) or
in .safetensors, or else is an Orbax directory. Names of the classes and the size of the pictures
are passed on. With --pretrained OUTPUT is a folder to share, which PyTorch and JAX both load:
model.safetensors, and config.json with names, settings, preprocessing and the licence that you
state.

A pickle runs nothing: it is read without torch.load, and refused where it holds more than weights
and plain data.

A published variant is recognised by its shapes, and what this program wrote carries its settings.
Any other network is stated as a variant and what differs from it, by the published names:

    --model stvit_small --embed_dim=16,32,48,64 --depths=1,2,2,1 --num_heads=1,2,3,4 ...
"""

import argparse
import ast
import dataclasses
import hashlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stvit_jax import command_line, places, torch_weights
from stvit_jax.checkpoints import files, fit, pretrained, weights
from stvit_jax.console import say
from stvit_jax.errors import UserError
from stvit_jax.models.segmenter import KINDS
from stvit_jax.models.settings import HEAD_SETTINGS, SETTINGS, UNOPTIMIZED, create, described
from stvit_jax.models.stvit import list_models

_TOLERANCE = 1e-9  # of the largest logit, in float64
_MOST_ENTRIES = 50  # that are listed one by one


def convert(
    source: str,
    output: str,
    *,
    ema: bool,
    model: str | None,
    verify: bool,
    share: bool = False,
    image_size: int | None = None,
    license: str | None = None,
    **overrides: Any,
) -> None:
    """Reads, identifies, writes and reports.

    Args:
      source: INPUT.
      output: OUTPUT.
      ema: the moving average in place of the raw weights.
      model: a variant, with `overrides`, where `source` does not tell it.
      verify: compare with PyTorch afterwards.
      share: write a folder to be shared.
      image_size: side of the pictures in pixels, in the place of what `source` says.
      license: of the weights, as `apache-2.0`, in a folder to be shared.
      **overrides: of `model`.

    Raises:
      UserError: anything that keeps the output from being exactly the input in another form.
    """
    found = weights.read(source, ema)
    say(f"input      {found.source}\n  sha256   {sha256(found.source)}")
    found = fit.fill(fit.identify(found, model, **overrides))
    found = dataclasses.replace(found, image_size=image_size or found.image_size)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(found.variables["params"]))
    say(
        f"found      {described(found.settings)}, {found.settings['num_classes']} classes, "
        f"{parameters:,} parameters, {'moving average' if ema else 'raw weights'}"
    )
    for note in found.notes:
        say(f"  note     {note}")
    for entry, reason in list(found.ignored.items())[:_MOST_ENTRIES]:
        say(f"  ignored  {entry}: {reason}")
    if (more := len(found.ignored) - _MOST_ENTRIES) > 0:
        say(f"  ignored  {more} entries more")
    if share:
        pretrained.write(output, found, license)
    else:
        weights.write(output, found)
    say(f"output     {output}\n  sha256   {sha256(files.located(output))}")
    if verify:
        say(f"verify     {compare(found, weights.read(output))}")


def compare(before: weights.Weights, after: weights.Weights) -> str:
    """The PyTorch model of `before` next to the Flax model of `after`, on random images.

    Both in float64, where only a mistake is larger than 1e-9.

    Raises:
      UserError: the logits differ, or there is no PyTorch or no checkout to compare with.
    """
    try:
        import torch

        from benchmarks import torch_segmenter, torch_stvit
    except ImportError as error:
        raise UserError(f"--verify needs PyTorch and a checkout of this project: {error}") from None
    settings = {k: v for k, v in before.settings.items() if k not in ("name", *HEAD_SETTINGS)}
    head, channels = (before.settings.get(field) for field in HEAD_SETTINGS)
    # A segmenter's convolutions at stride 4 are tens of times as long as all else.
    size = (1, 136, 104) if head else (2, 224, 224)
    images = np.random.default_rng(0).normal(size=(*size, settings["in_chans"]))
    if head:
        name = before.settings["name"]
        peer = torch_segmenter.create_segmenter(head, name, channels=channels, **settings)
    else:
        peer = torch_stvit.STViT(**settings)
    peer = peer.double().eval()
    state_dict = torch_weights.to_torch(before.variables, partial=not settings["num_classes"])
    peer.load_state_dict({k: torch.from_numpy(v) for k, v in state_dict.items()}, strict=True)
    with torch.no_grad():
        channels_first = torch.from_numpy(images).permute(0, 3, 1, 2)
        outputs = peer.head_logits(channels_first) if head else [peer(channels_first)]
    theirs = [np.moveaxis(x.numpy(), 1, -1) for x in outputs]

    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        model = create(after.settings, dtype=jnp.float64)
        variables = jax.tree.map(
            lambda x: x.astype(np.float64) if x.ndim else x, fit.identify(after).variables
        )
        how = dict(method="head_logits", auxiliary=True) if head else {}
        apply = jax.jit(partial(model.apply, **how), compiler_options=UNOPTIMIZED)
        ours = [np.asarray(x) for x in jax.tree.leaves(apply(variables, images))]
    pairs = list(zip(ours, theirs, strict=True))
    difference = np.max([np.max(np.abs(a - b)) for a, b in pairs])
    largest = np.max([np.max(np.abs(x)) for x in theirs])
    report = f"PyTorch and Flax in float64: largest difference {difference:.1e}, logits up to "
    report += f"{largest:.1e}"
    if not difference <= _TOLERANCE * largest:
        raise UserError(f"{report}: they do not agree")
    return report


def sha256(path: Path) -> str:
    """Of a file, or of the names and contents of all files in a directory, in sorted order."""
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    inner = sorted(places.files(path))
    lines = "".join(f"{sha256(p)}  {p.relative_to(path).as_posix()}\n" for p in inner)
    return hashlib.sha256(lines.encode()).hexdigest()


def _setting(text: str) -> Any:
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        raise argparse.ArgumentTypeError(f"{text!r} is no number, True, False or list") from None
    return tuple(value) if isinstance(value, list) else value


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code.

    Raises:
      UserError: as `convert`, or a mistake in the command line.
    """
    parser = command_line.parser("convert_torch_weights.py", __doc__)
    parser.add_argument("input", metavar="INPUT")
    parser.add_argument("--output", required=True)
    parser.add_argument("--model", metavar="NAME", help=", ".join(list_models()))
    parser.add_argument("--ema", action="store_true", help="take the moving average")
    parser.add_argument("--verify", action="store_true", help="run both networks on random images")
    parser.add_argument("--pretrained", action="store_true", dest="share", help="write a folder")
    parser.add_argument("--image_size", type=int, metavar="N", help="of pictures, in pixels")
    parser.add_argument("--license", metavar="NAME", help="of the weights, as apache-2.0")
    for field in SETTINGS:
        parser.add_argument(f"--{field}", type=_setting, help="overrides the one of --model")
    parser.add_argument("--head", choices=list(KINDS), help="of a segmenter; shapes tell it, too")
    parser.add_argument("--channels", type=_setting, help="likewise, of its head")
    args = vars(parser.parse_args(argv))
    overrides = {f: args.pop(f) for f in (*SETTINGS, *HEAD_SETTINGS)}
    overrides = {field: value for field, value in overrides.items() if value is not None}
    if overrides and not args["model"]:
        parser.error("overrides need --model")
    if args["license"] and not args["share"]:
        parser.error("--license is written with --pretrained only")
    convert(args.pop("input"), **args, **overrides)
    return 0


if __name__ == "__main__":
    command_line.entry(main)
