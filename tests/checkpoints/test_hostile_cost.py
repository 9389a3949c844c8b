"""Small files that ask for endless work, memory or text: refused in a line, and soon.

A file of weights is read in a process of its own, as many of these would hang or fill this one.
"""

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.checkpoints.test_torch_safety import archive

ROOT = Path(__file__).parents[2]
READ = """
import json, resource, sys
from pathlib import Path
from stvit_jax.checkpoints import fit, weights
from stvit_jax.errors import UserError
import torch
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[1:]:
    try:
        fit.identify(weights.read(path))
        message = "read"
    except UserError as error:
        message = str(error)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(json.dumps([Path(path).stem, message, grown]), flush=True)
"""


def doubled(opcode: bytes, times: int, start: bytes = b"") -> bytes:
    """Pushes an object that holds one twice, which holds one twice, and so on."""
    double = {
        b"t": b"q\x01h\x01\x86",  # a tuple of two
        b"l": b"q\x010]h\x01ah\x01a",  # a list, appended to twice
    }[opcode]
    return (start or {b"t": b")", b"l": b"]"}[opcode]) + double * times


def encoded(depth: int) -> bytes:
    """Text in hexadecimal, of text in hexadecimal, and so on: each is twice as long."""
    return (
        b"c_codecs\nencode\n" * depth
        + b"X\x04\x00\x00\x00abcd"
        + b"X\x03\x00\x00\x00hex\x86R" * depth
    )


def entry(name: str, value: bytes) -> bytes:
    """Pushes a dictionary with one entry."""
    return b"}X" + len(name).to_bytes(4, "little") + name.encode() + value + b"s"


def text(value: str) -> bytes:
    return b"X" + len(value.encode()).to_bytes(4, "little") + value.encode()


def programs() -> Iterator[tuple[str, bytes]]:
    yield "encoded in hexadecimal", entry("model", encoded(40))
    yield "a key that is a doubled tuple", b"}" + doubled(b"t", 60) + b"K\x01s"
    yield "a doubled tuple in a set", b"c__builtin__\nset\n" + doubled(b"t", 60) + b"\x85\x85R"
    yield "doubled lists", entry("model", doubled(b"l", 60))
    yield "dictionaries in dictionaries, doubled", entry("model", doubled(b"t", 60, b"}"))
    yield "a list of a list, and so on", entry("model", b"]" * 200_000 + b"a" * 199_999)
    yield "instructions without end", b"]0" * 3_000_000 + b"}"
    yield (
        "a state that hides the entries",
        (b"ccollections\nOrderedDict\n)R" + entry("items", b"K\x01") + b"b"),
    )
    yield (
        "numbers that are keys and collide",
        b"}("
        + b"".join(
            b"\x8a\x0c" + (i * (2**61 - 1)).to_bytes(12, "little") + b"N" for i in range(50_000)
        )
        + b"u",
    )
    long = text("x" * 2**22)
    yield (
        "long keys that are equal",
        (b"}q\x00" + long + b"q\x01" + long + b"q\x02000h\x00h\x01Ns" + b"h\x00h\x02Ns" * 50_000),
    )
    yield (
        "arguments that are copied",
        b"(" + b"N" * 500_000 + b"lq\x010" + (b"c__builtin__\nset\nh\x01R0" * 10_000 + b"}"),
    )
    yield (
        "a name that is put together again and again",
        (text("a" * 2**22) + b"q\x01" + b"h\x01h\x01\x930" * 10_000 + b"}"),
    )
    axes = b"(" + b"K\x01" * 500_000 + b"tq\x02"
    rebuild = b"ctorch._utils\n_rebuild_tensor_v2\n"
    storage = (
        b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K\x04tQ"
    )
    tensor = rebuild + b"(" + storage + b"K\x00h\x02h\x02\x89NtR"
    yield (
        "axes without end",
        axes
        + b"0"
        + entry("model", b"}(" + b"".join(text(f"a.{i}") + tensor for i in range(500)) + b"u"),
    )


def state(**changes: torch.Tensor) -> dict[str, torch.Tensor]:
    shapes = json.loads((ROOT / "tests/golden/state_keys/tiny.json").read_text())
    kernel = torch.eye(9).reshape(9, 1, 3, 3)
    zeros = {n: kernel if "fold." in n else torch.zeros(shape) for n, shape in shapes.items()}
    zeros = {n: x.long() if n.endswith("tracked") else x for n, x in zeros.items()}
    return zeros | changes


def with_settings(path: Path, name: str, value: bytes) -> Path:
    """Sound weights, and a setting beside them that is given as instructions of a pickle."""
    settings = {"name": "stvit_small", "embed_dim": [16, 32, 48, 64], "depths": [1, 2, 2, 1]}
    torch.save({"model": state(), "stvit_config": settings | {name: "HERE"}}, path)
    with zipfile.ZipFile(path) as file:
        members = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(path, "w") as file:
        for member, content in members.items():
            if member.endswith("data.pkl"):
                assert content.count(text("HERE")) == 1
                memo = value.replace(b"q\x01", b"r\xff\xff\x00\x00")
                memo = memo.replace(b"h\x01", b"j\xff\xff\x00\x00")
                content = content.replace(text("HERE"), memo)
            file.writestr(member, content)
    return path


@pytest.fixture(scope="module")
def messages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, int]]:
    """Of every hostile file what was said, and by how many KiB the process had grown."""
    folder = tmp_path_factory.mktemp("hostile")
    paths = [archive(folder / f"{n}.pth", b"\x80\x02" + p + b".") for n, p in programs()]
    for name, value in {
        "num_heads": doubled(b"l", 60),
        "n_iter": b"](M\xe8\x03M\xe8\x03M\xe8\x03M\xe8\x03e",
        "mlp_ratio": b"\x8a\xff" + b"\x7f" * 255,
        "depths": b"](" + b"K\x01" * 100_000 + b"e",
        "stoken_size": b"]J\xff\xff\xff\x7fa",
        "name": doubled(b"l", 60),
        "colour\n\x1b[2J": doubled(b"t", 60),
    }.items():
        paths.append(with_settings(folder / f"setting {name[:6].strip()}.pth", name, value))
    rest = {"layers.99.blocks.99.norm2.weight": torch.zeros(1)}
    torch.save(state(**rest), folder / "missing names.pth")
    torch.save(
        state() | {f"a{i}\n\x1b[2J.b": torch.zeros(1) for i in range(5000)},
        folder / "strange names.pth",
    )
    torch.save(
        {f"\n\x1b[2J{i}": {} for i in range(500)} | {"model": state()}, folder / "entries.pth"
    )
    nested = {"layers.0.blocks.0.mlp2.fc1.weight": torch.zeros(64, 16, 3, 3)}
    torch.save(state(**nested), folder / "other kernel.pth")
    paths += [
        folder / f"{n}.pth" for n in ("missing names", "strange names", "entries", "other kernel")
    ]
    (folder / "zero.pth").symlink_to("/dev/zero")
    os.mkfifo(folder / "pipe.pth")
    paths += [folder / "zero.pth", folder / "pipe.pth"]
    result = subprocess.run(
        [sys.executable, "-c", READ, *map(str, paths)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr[-2000:]
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    return {name: (message, grown) for name, message, grown in lines}


def test_nothing_takes_long_or_much_memory(messages):
    assert len(messages) == len(list(programs())) + 7 + 6
    assert max(grown for _, grown in messages.values()) < 256 * 1024, messages


def test_messages_are_one_printable_line_that_ends(messages):
    for name, (message, _) in messages.items():
        assert message.isprintable() and message != "read" and len(message) < 1000, name


@pytest.mark.parametrize(
    "name, said",
    {
        "instructions without end": "it has more than 2,000,000 instructions",
        "a state that hides the entries": "these are not the weights of an STViT",
        "setting n_iter": "n_iter lies outside of 0 to 99",
        "setting num_he": "num_heads is no number, truth value or text, and no list of up to 16",
        "strange names": r"unexpected: a0 \x1b[2J.b, a1",
        "missing names": "missing: layers.3.downsample.proj.0.weight, ",
        "other kernel": "has shape (64, 16, 3, 3); expected (any, any, 1, 1)",
        "zero": "is a device, and no file",
        "pipe": "is a pipe, and no file",
    }.items(),
)
def test_what_is_wrong_is_said(name, said, messages):
    assert said in messages[name][0]
