"""Google Cloud Storage on 127.0.0.1: PyPI's gcp-storage-emulator as a process that can be killed.

Run as a program it serves a folder on a port.
"""

import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import quote

BUCKET = "a-bucket"


class Emulator:
    """Serves the objects in a folder, which outlive it; `environment` leads programs to it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.start()

    @property
    def environment(self) -> dict[str, str]:
        return environment(self.port)

    def start(self) -> None:
        """Returns when it answers."""
        command = [sys.executable, __file__, str(self.port), str(self._folder)]
        self._process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        for _ in range(300):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/", timeout=5).close()
                return
            except (urllib.error.URLError, OSError):
                assert self._process.poll() is None, "the emulator ended"
                time.sleep(0.1)
        raise AssertionError("the emulator does not answer")

    def kill(self) -> None:
        """As kill -9; `start` goes on with the same objects."""
        self._process.kill()
        self._process.wait()

    def suspend(self) -> None:
        """From now on it takes requests and answers none."""
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Goes on after `suspend`."""
        self._process.send_signal(signal.SIGCONT)

    def forget(self, address: str) -> None:
        """Removes an object, as somebody else who uses the bucket does."""
        bucket, _, name = address.removeprefix("gs://").partition("/")
        url = f"http://127.0.0.1:{self.port}/storage/v1/b/{bucket}/o/{quote(name, safe='')}"
        urllib.request.urlopen(urllib.request.Request(url, method="DELETE"), timeout=5).close()

    def path(self, address: str) -> Path:
        """The file or folder of an object on this disk: a bucket's content for tests to damage."""
        return self._folder / ".cloudstorage" / address.removeprefix("gs://")


def environment(port: int) -> dict[str, str]:
    """What leads a program, with all libraries in it, to an emulator."""
    address = f"http://127.0.0.1:{port}"
    return {
        "STORAGE_EMULATOR_HOST": address,
        "TENSORSTORE_GCS_HTTP_URL": address,
        # Or Google's libraries look for a machine of theirs, for credentials, at every request.
        "NO_GCE_CHECK": "true",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    }


def conditional(handle: Callable[..., None]) -> Callable[..., None]:
    """Lets a request depend on an object's generation, as the real storage does: TensorStore does.

    The emulator gives generations, but neither says nor compares them.
    """
    from gcp_storage_emulator.exceptions import NotFound

    def handle_where_it_holds(request: Any, response: Any, storage: Any, *args: Any) -> None:
        body_is_read = request.data is not None  # before any answer, or the client sees a reset
        name = request.params.get("object_id") or request.query.get("name", [""])[0]
        try:
            found = storage.get_file_obj(request.params["bucket_name"], name)["generation"]
        except NotFound:
            found = "0"
        wanted, known = (
            request.query.get(f"ifGeneration{kind}", [None])[0] for kind in ("Match", "NotMatch")
        )
        if wanted not in (None, found):
            response.status = HTTPStatus.PRECONDITION_FAILED
        elif known == found and not body_is_read:
            response.status = HTTPStatus.NOT_MODIFIED
        else:
            response["x-goog-generation"] = found
            handle(request, response, storage, *args)

    return handle_where_it_holds


def write_bytes(store: Any, name: str, content: bytes) -> None:
    """Whole, or not at all: the emulator rewrites its list of all objects at any request."""
    path = store._disk_path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name[:200]}.unfinished")
    unfinished.write_bytes(content)
    unfinished.replace(path)


def serve(port: int, folder: str) -> None:
    """Until it is killed."""
    from gcp_storage_emulator import storage
    from gcp_storage_emulator.handlers import objects

    storage._FileStore.write_bytes = write_bytes
    storage.DEFAULT_SOFT_DELETE_RETENTION_SECONDS = 0
    for name in ("get", "download", "insert", "delete"):
        setattr(objects, name, conditional(getattr(objects, name)))
    from gcp_storage_emulator import server  # its table takes the handlers as they are now

    running = server.create_server("127.0.0.1", port, data_dir=folder)
    if running._storage.get_bucket(BUCKET) is None:
        server.buckets.create_bucket(BUCKET, running._storage)
    running.run()


if __name__ == "__main__":
    serve(int(sys.argv[1]), sys.argv[2])
