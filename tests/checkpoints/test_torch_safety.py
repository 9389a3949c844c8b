"""`.pth` files that are malicious, absurd, damaged or foreign; no torch, or an old one."""

import argparse
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from stvit_jax.checkpoints import torch_files
from stvit_jax.errors import UserError

ROOT = Path(__file__).parents[2]


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def attacks(mark: Path) -> dict[str, object]:
    """What would leave `mark` behind if anything of it ran."""
    touch = f"touch {mark}"
    return {
        "system": {"model": Call(os.system, touch)},
        "eval": {"model": {}, "args": Call(eval, f"__import__('os').system({touch!r})")},
        "exec": Call(exec, f"open({str(mark)!r}, 'w')"),
        "nested": {"model": [({"a": Call(getattr, Call(__import__, "os"), "system")},)]},
        "nested_reduce": Call(Call, Call(os.system, touch)),
        "popen": {"model": {}, "scaler": Call(subprocess.Popen, ["touch", str(mark)])},
        "bytes": {"model": Call(bytearray, 10**13)},
        "torch": {"model": Call(torch.zeros, 10**13)},
    }


def archive(path: Path, program: bytes, compression: int = zipfile.ZIP_STORED) -> Path:
    """A file laid out as torch.save does, around a pickle of ours."""
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("w/data.pkl", program)
        file.writestr("w/byteorder", "little")
        file.writestr("w/data/0", bytes(16))
        file.writestr("w/version", "3\n")
    return path


def one_line(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        held = torch_files.read(path)
        torch_files.arrays(held.get("model", held), path)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 800
    assert str(path) in str(caught.value)
    return str(caught.value)


def program_of(path: Path) -> bytes:
    with zipfile.ZipFile(path) as file:
        return file.read(f"{path.stem}/data.pkl")


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("name", attacks(Path()))
def test_malicious_pickles_run_nothing(name, protocol, tmp_path):
    mark = tmp_path / "ran"
    program = pickle.dumps(attacks(mark)[name], protocol=protocol)
    message = one_line(archive(tmp_path / "w.pth", program))
    assert "nothing of it was run, do not trust this file" in message
    (tmp_path / "bare.pth").write_bytes(program)
    message = one_line(tmp_path / "bare.pth")
    assert "a bare pickle" in message or "not a file that torch.save wrote" in message
    assert not mark.exists()
    if name == "system" and protocol == 2:
        pickle.loads(program)  # it would have run
        assert mark.exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_nothing_runs_even_of_what_is_allowed(protocol, tmp_path, monkeypatch):
    """The second barrier: there is nothing in the reader that could import or call anything."""
    mark = tmp_path / "ran"
    monkeypatch.setattr(torch_files, "_ALLOWED", {"posix.system", "torch._utils._rebuild_tensor"})
    program = pickle.dumps({"model": {"w": attacks(mark)["system"]["model"]}}, protocol)
    assert "under 'w' is a system, no plain tensor" in one_line(
        archive(tmp_path / "w.pth", program)
    )
    assert not mark.exists()


def test_a_training_checkpoint_is_read(tmp_path):
    path = tmp_path / "w.pth"
    parameter = torch.nn.Parameter(torch.arange(4.0))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    named = torch.arange(6.0).reshape(2, 3)
    named.note = "an attribute"
    whole = torch.arange(24.0).reshape(2, 3, 4)
    model = {
        "parameter": parameter,
        "buffer": torch.nn.Buffer(torch.ones(2)),
        "named": named,
        "number": torch.tensor(7),
        "half": torch.ones(2, dtype=torch.bfloat16) / 3,
        "eighth": torch.tensor([0.5, -1.75]).to(torch.float8_e4m3fn),
        "truth": torch.tensor([True, False]),
        "turned": whole.transpose(0, 2),  # these two share a storage
        "part": whole[1, :, 1:3],
        "empty": torch.zeros(0, 3),
    }
    saved = {
        "model": model,
        "optimizer": optimizer.state_dict(),
        "scaler": {"scale": 65536.0},
        "max_accuracy": np.float64(83.6),
        "args": argparse.Namespace(lr=5e-4, seed=np.int64(3), ratio=np.float32(0.5), ok=np.True_),
    }
    for protocol in (2, 4):
        torch.save(saved, path, pickle_protocol=protocol)
        loaded = torch_files.read(path)
        assert loaded.keys() == saved.keys()
        arrays = torch_files.arrays(loaded["model"], path)
        assert list(arrays) == list(model)
        for name, tensor in model.items():
            narrow = tensor.is_floating_point() and tensor.itemsize < 4
            expected = (tensor.float() if narrow else tensor).detach().numpy()
            assert arrays[name].dtype == expected.dtype
            np.testing.assert_array_equal(arrays[name], expected, err_msg=name)


def test_a_file_without_checksums_is_read_and_a_flipped_bit_is_noticed_with_them(tmp_path):
    path = tmp_path / "w.pth"
    saved = {"model": {"a.b": torch.arange(1000.0)}}
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(saved, path)
    finally:
        torch.serialization.set_crc32_options(True)
    arrays = torch_files.arrays(torch_files.read(path)["model"], path)
    np.testing.assert_array_equal(arrays["a.b"], np.arange(1000.0))
    torch.save(saved, path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert "is truncated or damaged" in one_line(path)


def test_truncated_and_foreign_files_are_one_line(tmp_path):
    path = tmp_path / "w.pth"
    torch.save({"model": {"a": torch.arange(1000.0)}}, path)
    whole = path.read_bytes()
    for content, reason in {
        whole[: len(whole) // 2]: "is truncated or damaged",
        whole[:-30]: "is truncated or damaged",
        whole[:10]: "is truncated or damaged",
        b"": "is not a file that torch.save wrote: it is empty",
        b"<html>404 Not Found</html>": "is not a file that torch.save wrote: it is a web page",
        b"\x89PNG\r\n": "is not a file that torch.save wrote: it is a picture",
        b"\x1f\x8b\x08": "is not a file that torch.save wrote: it is compressed by gzip: unpack it",
        b"version https://git-lfs.github.com/spec/v1": "it is a pointer of git-lfs: `git lfs pull`",
        bytes(5000): "it begins with zeros",
    }.items():
        path.write_bytes(content)
        assert reason in one_line(path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("readme.txt", "weights")
    assert "not one that torch.save wrote" in one_line(path)
    assert "is no pickle" in one_line(archive(path, b"\xff\xffgarbage"))
    archive(path, pickle.dumps({"model": {}}, 2)[:-3])
    assert "is damaged" in one_line(path)


def test_the_old_format_is_refused_with_the_way_out(tmp_path):
    path = tmp_path / "w.pth"
    torch.save({"model": {"a": torch.ones(3)}}, path, _use_new_zipfile_serialization=False)
    assert "as torch before 1.6 wrote it; it is not opened: torch.load and" in one_line(path)


@pytest.mark.parametrize(
    "value, found",
    [
        ({"a": 5}, "under 'a' is int, no plain tensor"),
        ({"a": torch.ones(2), 3: torch.ones(2)}, "3 is no name in it"),
        ({"a": [1.0]}, "under 'a' is list, no plain tensor"),
        ({"a\n\x1b[2J" * 99: [1.0]}, "is list, no plain tensor"),
        ({"a": torch.eye(3).to_sparse()}, "under 'a' is a sparse_tensor, no plain tensor"),
        (
            {"a": torch.ones(2, device="meta")},
            "under 'a' is a meta_tensor_no_storage, no plain tensor",
        ),
        ({"a": np.ones(3)}, "under 'a' is a reconstruct, no plain tensor"),
        ([torch.ones(2)], "holds no state dict but list"),
        (torch.ones(2), "holds no state dict but a tensor"),
    ],
)
def test_what_is_no_state_dict_is_one_line(value, found, tmp_path):
    torch.save(value, tmp_path / "w.pth")
    message = one_line(tmp_path / "w.pth")
    assert "holds no state dict" in message and found in message


def test_programs_and_whole_models_are_called_so(tmp_path):
    network = torch.nn.Sequential(torch.nn.Linear(2, 2))
    torch.save(network, tmp_path / "whole.pth")
    assert "holds a whole model (torch.nn.modules." in one_line(tmp_path / "whole.pth")
    torch.jit.save(torch.jit.script(network), tmp_path / "script.pth")
    assert "is a program of TorchScript" in one_line(tmp_path / "script.pth")
    network.attack = Call(os.system, "true")
    torch.save(network, tmp_path / "attack.pth")
    assert "do not trust this file" in one_line(tmp_path / "attack.pth")


def bombs(folder: Path) -> list[Path]:
    """Small files that promise terabytes."""
    honest = folder / "w.pth"
    torch.save({"a": torch.zeros(4)}, honest)
    program = program_of(honest)
    size, stride = b"K\x04\x85", b"K\x01\x85"
    assert program.count(b"K\x04t") == program.count(size) == program.count(stride) == 1
    huge = pickle.dumps(10**12, 2)[2:-1]
    programs = {
        "storage": program.replace(b"K\x04t", huge + b"t"),
        "shape": program.replace(size, huge + b"\x85"),
        "repeated": program.replace(size, huge + b"\x85").replace(stride, b"K\x00\x85"),
        "integer": b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b".",
        "string": b"\x80\x02X" + struct.pack("<I", 2**32 - 1) + b".",
    }
    scalar = np.dtype("V2000000000")
    programs["scalar"] = (
        b"\x80\x02cnumpy.core.multiarray\nscalar\ncnumpy\ndtype\n"
        + pickle.dumps(scalar.str, 2)[2:-1]
        + b"\x85RC\x00\x86R."
    )
    paths = [archive(folder / f"{name}.pth", bomb) for name, bomb in programs.items()]
    paths.append(archive(folder / "deflated.pth", bytes(2**28), zipfile.ZIP_DEFLATED))
    content = honest.read_bytes()
    at = content.index(b"PK\x06\x06") + 24  # entries, entries in all, size of the directory
    for name, patched in {
        "members": _with_sizes(content, b"\xff\xff\xff\x7f"),
        "directory": content[:at] + 3 * (2**62).to_bytes(8, "little") + content[at + 24 :],
    }.items():
        (folder / f"{name}.pth").write_bytes(patched)
        paths.append(folder / f"{name}.pth")
    return paths


def _with_sizes(content: bytes, size: bytes) -> bytes:
    """All entries of the central directory claim `size`, compressed and not."""
    patched, position = bytearray(content), content.find(b"PK\x01\x02")
    while position >= 0:
        patched[position + 20 : position + 28] = 2 * size
        position = content.find(b"PK\x01\x02", position + 4)
    return bytes(patched)


MEASURE = """
import json, resource, sys
from pathlib import Path
import torch
from stvit_jax.checkpoints import torch_files
from stvit_jax.errors import UserError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
messages = {}
for path in map(Path, sys.argv[1:]):
    try:
        held = torch_files.read(path)
        torch_files.arrays(held.get("model", held), path)
    except UserError as error:
        messages[path.stem] = str(error)
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(json.dumps({"messages": messages, "grown": grown}))
"""


def test_headers_that_promise_terabytes_cost_no_memory(tmp_path):
    paths = bombs(tmp_path)
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, paths)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    result = json.loads(result.stdout)
    assert set(result["messages"]) == {path.stem for path in paths}
    assert all("\n" not in message for message in result["messages"].values())
    assert result["grown"] < 64 * 1024  # KiB


@pytest.mark.parametrize(
    "source, message",
    [
        ("raise ImportError('blocked')", "error: .pth files need PyTorch: pip install 'torch>=2.1"),
        ("__version__ = '2.9.1+cpu'", "error: torch 2.9.1+cpu cannot read files safely: pip inst"),
        ("__version__ = '1.13.1'", "error: torch 1.13.1 cannot read files safely: pip install"),
    ],
)
def test_without_torch_or_with_an_old_one(source, message, tmp_path):
    torch.save({"model": {"a": torch.ones(3)}}, tmp_path / "w.pth")
    package = tmp_path / "packages" / "torch"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(source)
    result = subprocess.run(
        [sys.executable, "convert_torch_weights.py", str(tmp_path / "w.pth"), "--output", "x"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(package.parent)},
    )
    assert result.returncode == 1
    assert result.stderr.startswith(message)
    assert result.stderr.count("\n") == 1


def test_safetensors_and_directories_need_no_torch(tmp_path):
    package = tmp_path / "packages" / "torch"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('blocked')")
    program = (
        "import sys, jax, numpy as np\n"
        "from stvit_jax.checkpoints import weights\n"
        "from stvit_jax.models.settings import abstract\n"
        "from stvit_jax.models.stvit import create_model\n"
        "zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype),"
        " abstract(create_model('stvit_tiny')))\n"
        "made = weights.Weights(zeros, {'name': 'stvit_tiny'}, None, {})\n"
        "for name in ('w', 'w.safetensors'):\n"
        "    weights.write(sys.argv[1] + '/' + name, made)\n"
        "    weights.read(sys.argv[1] + '/' + name)\n"
    )
    subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(package.parent)},
        check=True,
    )


def test_written_files_have_no_more_than_they_say(tmp_path):
    path = tmp_path / "w.pth"
    beside = {"stvit_config": {"name": "stvit_tiny", "depths": [1]}, "class_names": ["a"]}
    with path.open("wb") as file:
        torch_files.write(file, {"a": np.ones(3, np.float32)}, beside)
    loaded = torch.load(io.BytesIO(path.read_bytes()), weights_only=True)
    assert loaded.keys() == {"model", "stvit_config", "class_names"}
    assert {key: loaded[key] for key in beside} == beside
    assert torch.equal(loaded["model"]["a"], torch.ones(3))
