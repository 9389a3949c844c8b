"""Paths on this machine and in buckets, and what is said where a bucket does not let us in."""

import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from stvit_jax import places
from stvit_jax.errors import UserError
from tests.emulator import environment
from tests.program import ROOT


@pytest.mark.parametrize(
    "text, path",
    [
        ("gs://a-bucket/run", "gs://a-bucket/run"),
        ("gs://a-bucket/run/", "gs://a-bucket/run"),
        ("gs://a.b_c-1", "gs://a.b_c-1"),
        ("gs:/a-bucket/run", "gs://a-bucket/run"),  # str(Path("gs://a-bucket/run"))
    ],
)
def test_a_path_in_a_bucket_keeps_its_address(text: str, path: str) -> None:
    found = places.place("--workdir", text)
    assert places.in_bucket(found) and str(found) == path
    assert str(places.of(found / "checkpoints" / "3")) == f"{path}/checkpoints/3"
    assert (found / "a" / "b").relative_to(found).as_posix() == "a/b"


def test_a_path_of_this_machine_is_a_plain_one(tmp_path: Path) -> None:
    found = places.place("--workdir", str(tmp_path))
    assert type(found) is type(tmp_path) and found == tmp_path and not places.in_bucket(found)
    places.reach(found)
    with pytest.raises(KeyError), places.os_errors(found):  # nothing is made of it
        raise KeyError


def test_a_bucket_fails_as_a_disk_does() -> None:
    path = places.of("gs://a-bucket/x")
    with pytest.raises(OSError, match="KeyError: 'x'"), places.os_errors(path):
        raise KeyError("x")
    with pytest.raises(FileNotFoundError) as caught, places.os_errors(path):
        raise FileNotFoundError("b/a-bucket/o/x")
    assert caught.value.strerror == "No such file or directory"
    with pytest.raises(UserError), places.os_errors(path):
        raise UserError


@pytest.fixture
def refusing() -> Iterator[int]:
    """The port of a storage that lets nobody in: 401 to whoever has no account, 403 later."""

    class Refuse(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            code = 403 if "secret" in self.path else 401
            body = json.dumps({"error": {"code": code, "message": "no access to that"}}).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refuse)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()


def test_who_is_not_let_in_is_told_how_to_log_in(refusing: int) -> None:
    program = (
        "from stvit_jax import places\n"
        "for name in ('gs://a-bucket/run', 'gs://secret-bucket/run'):\n"
        "    try:\n"
        "        places.reach(places.of(name))\n"
        "    except ValueError as error:\n"
        "        print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=os.environ | environment(refusing),
        capture_output=True,
        text=True,
        timeout=100,
    )
    first, second = done.stdout.splitlines()
    assert done.stderr == "" and "no access to that" in first + second
    for line, bucket in ((first, "a-bucket"), (second, "secret-bucket")):
        assert line.startswith(f"gs://{bucket} cannot be reached (")
        assert "gcloud auth application-default login" in line and len(line) < 500


def test_buckets_cost_nothing_where_nobody_names_one() -> None:
    program = (
        "import sys; from stvit_jax import command_line\n"
        "command_line.train(['--config=configs/digits.py', '--workdir=w'], '')\n"
        "print(sorted({'etils', 'fsspec', 'aiohttp', 'gcsfs', 'jax'} & sys.modules.keys()))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert done.stdout == "[]\n", done.stdout + done.stderr
