"""The loader: the same data however it is loaded, bad images, and processes that come and go."""

import multiprocessing
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from stvit_jax.data import decode
from stvit_jax.data.examples import Batch, batch_spec
from stvit_jax.data.loader import Batches, eval_batches, train_batches
from stvit_jax.data.order import Order, image_rng
from stvit_jax.data.prefetch import device_prefetch
from stvit_jax.data.sources import Source, open_source
from stvit_jax.errors import UserError
from tests.data.labelled import SIZE, examples
from tests.data.processes import run_script

ROOT = Path(__file__).parents[2]
SPOILT = [3, 4, 20, 21, 22]


@pytest.fixture
def source(digits_dir: Path) -> Source:
    return open_source("tfds", "digits", str(digits_dir), train=True)


@pytest.fixture
def spoilt(tmp_path: Path) -> Source:
    """A folder of 40 images of which 5 do not decode."""
    for number in range(40):
        for split in ("train", "val"):
            path = tmp_path / split / f"class{number // 20}" / f"{number:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            if number in SPOILT:
                path.write_bytes(b"no image")
            else:
                Image.new("RGB", (20, 20), (6 * number, 0, 0)).save(path)
    return open_source("folder", "", str(tmp_path), train=True)


def take(batches: Batches, count: int) -> list[Batch]:
    try:
        return [next(batches) for _ in range(count)]
    finally:
        batches.close()


def assert_same(ours: list[Batch], expected: list[Batch]) -> None:
    assert len(ours) == len(expected)
    for a, b in zip(ours, expected, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key], err_msg=key)
            assert a[key].dtype == b[key].dtype


def slow_train(source: Source, order: Order, batch: int) -> Batch:
    """A batch by the rules: walk on from an unreadable position to the next readable one."""
    epoch, step = divmod(batch, order.steps_per_epoch)
    rows = []
    for slot in range(order.batch_size):
        position, replaced = int(order.positions(step, np.array(slot))), 0
        while True:
            index, copy = map(int, order.images(epoch, position % order.positions_per_epoch))
            data, label = source[index]["image"], source[index]["label"]
            try:
                rng = image_rng(order.seed, epoch, index, copy)
                rows.append((decode.train_image(data, SIZE, rng, True), label, replaced))
                break
            except decode.UnreadableImage:
                position, replaced = position + 1, replaced + 1
    image, label, replaced = (np.stack(column) for column in zip(*rows, strict=True))
    return {
        "image": image,
        "label": label.astype(np.int32),
        "mask": np.ones(order.batch_size, bool),
        "unreadable": replaced.astype(np.int32),
    }


def test_training_data_does_not_depend_on_who_loads_it(source: Source) -> None:
    """Workers, the split over processes, and where the loader starts; over the epoch's edge."""
    order = Order(len(source), 80, 16, 3, seed=5)  # 80: the last part of a batch is smaller
    start = order.steps_per_epoch - 2

    def load(count: int, **arguments: object) -> list[Batch]:
        arguments = {"start": start} | arguments
        return take(train_batches(examples(source), order, **arguments), count)

    expected = [slow_train(source, order, start + number) for number in range(4)]
    assert not np.array_equal(expected[0]["image"], expected[2]["image"])
    assert_same(load(4), expected)
    assert_same(load(2, start=start + 2), expected[2:])
    assert_same(load(4, workers=2), expected)

    some = np.r_[48:80, 0:16]
    assert_same(load(4, slots=some), [{k: v[some] for k, v in b.items()} for b in expected])
    halves = [load(4, slots=slots) for slots in (slice(0, 40), slice(40, 80))]
    joined = [
        {key: np.concatenate([a[key], b[key]]) for key in a} for a, b in zip(*halves, strict=True)
    ]
    assert_same(joined, expected)


@pytest.mark.parametrize("train", [True, False])
def test_a_batch_is_as_the_spec_says(spoilt: Source, train: bool) -> None:
    """Padding and unreadable examples included."""
    given = examples(spoilt)
    order = Order(len(spoilt), 24)
    batches = train_batches(given, order) if train else eval_batches(given, batch_size=24)
    spec = {key: ((24, *shape), dtype) for key, (shape, dtype) in batch_spec(given).items()}
    for batch in take(batches, 2):
        assert {key: (rows.shape, rows.dtype) for key, rows in batch.items()} == spec


def test_flags_of_the_user_stay_unparsed(digits_dir: Path, tmp_path: Path) -> None:
    program = """
import sys
from absl import flags
from stvit_jax.data.loader import train_batches
from stvit_jax.data.order import Order
from stvit_jax.data.sources import open_source
from tests.data.labelled import examples

flags.DEFINE_string("mine", "default", "help")
if __name__ == "__main__":
    source = open_source("tfds", "digits", sys.argv[1], train=True)
    for workers in (0, 1):
        batches = train_batches(examples(source), Order(len(source), 32), workers=workers)
        next(batches)
        batches.close()
    assert not flags.FLAGS.is_parsed()
    assert flags.FLAGS(["program", "--mine=given"]) == ["program"] and flags.FLAGS.mine == "given"
"""
    done = run_script(program, tmp_path, digits_dir)
    assert done.returncode == 0, done.stderr


def test_unreadable_images_are_replaced_by_the_next_position(
    spoilt: Source, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("stvit_jax.data.parts._named_unreadable", set())
    order = Order(len(spoilt), 20, 10, 3, seed=16)
    last, _ = order.images(0, order.positions_per_epoch - 1)
    assert last in SPOILT  # the order goes round
    expected = [slow_train(spoilt, order, number) for number in range(4)]
    replaced = np.concatenate([batch["unreadable"] for batch in expected])
    assert replaced.max() >= 2 and (replaced == 0).sum() > 40
    assert_same(take(train_batches(examples(spoilt), order), 4), expected)
    # Each is named once, though it is met several times. The loader may have worked ahead.
    places = (divmod(number, order.steps_per_epoch) for number in range(4))
    taken = [order.images(e, order.positions(step, np.arange(20)))[0] for e, step in places]
    met = set(SPOILT) & set(np.concatenate(taken).tolist())
    named = [line for line in capfd.readouterr().err.splitlines() if "does not decode: " in line]
    numbers = [int(Path(line.split(" does not decode: ")[0]).stem) for line in named]
    assert len(met) > 2 and met <= set(numbers) <= set(SPOILT)
    assert len(numbers) == len(set(numbers))
    assert "no known format" in named[0]


def test_a_set_without_readable_images_stops(spoilt: Source, tmp_path: Path) -> None:
    for path in (tmp_path / "train").glob("*/*.png"):
        path.write_bytes(b"no image")
    batches = train_batches(examples(spoilt), Order(len(spoilt), 20))
    with pytest.raises(UserError, match=r"in a row do not decode.*\d\d\.png: .*check the data"):
        take(batches, 1)


@pytest.mark.parametrize("batch_size", [7, 40, 64])
def test_evaluation_sees_every_image_once(spoilt: Source, batch_size: int) -> None:
    batches = eval_batches(examples(spoilt), batch_size=batch_size, workers=2)
    loaded = list(batches)
    batches.close()
    assert len(loaded) == -(-40 // batch_size)
    joined = {key: np.concatenate([batch[key] for batch in loaded]) for key in loaded[0]}
    assert joined["mask"].tolist() == [True] * 40 + [False] * (len(joined["mask"]) - 40)
    assert np.flatnonzero(joined["unreadable"]).tolist() == SPOILT
    labels = [0 if number in SPOILT else number // 20 for number in range(40)]
    assert joined["label"][:40].tolist() == labels
    reds = [0 if number in SPOILT else 6 * number for number in range(40)]
    np.testing.assert_array_equal(joined["image"][:40, 8, 8, 0], reds)

    shares = [
        list(eval_batches(examples(spoilt), batch_size=batch_size, slots=slots))
        for slots in (slice(0, 3), slice(3, None))
    ]
    for whole, first, second in zip(loaded, *shares, strict=True):
        for key in whole:
            np.testing.assert_array_equal(whole[key], np.concatenate([first[key], second[key]]))


def test_large_sets_are_evaluated_by_workers_alike(digits_dir: Path, monkeypatch) -> None:
    source = open_source("tfds", "digits", str(digits_dir), train=False)
    here = list(eval_batches(examples(source), batch_size=100, workers=1))
    monkeypatch.setattr("stvit_jax.data.loader.IN_PROCESS_EXAMPLES", 0)
    batches = eval_batches(examples(source), batch_size=100, workers=1)
    first = next(batches)
    assert len(multiprocessing.active_children()) == 1
    assert_same([first, *batches], here)
    batches.close()
    assert multiprocessing.active_children() == []
    # Of shared memory that is not given back, Python warns at the end of the program.
    wait_until(lambda: "/dev/shm/psm_" not in Path("/proc/self/maps").read_text())


def test_a_corrupt_record_stops_the_workers_run(digits_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(digits_dir, tmp_path / "data")
    (path,) = (tmp_path / "data" / "digits" / "1.0.0").glob("digits-train.array_record*")
    data = bytearray(path.read_bytes())
    data[data.index(b"IDAT", 1000) + 6] ^= 4
    path.write_bytes(data)
    source = open_source("tfds", "digits", str(tmp_path / "data"), train=True)
    order = Order(len(source), 64, repeats=1)
    batches = train_batches(examples(source), order, workers=1)
    prefetched = device_prefetch(batches, sharding())
    with pytest.raises(UserError, match="digits-train.array_record.*is damaged"):
        for _ in range(order.steps_per_epoch):
            next(prefetched)
            arrived = time.monotonic()
    assert time.monotonic() - arrived < 10
    assert list(prefetched) == []
    assert multiprocessing.active_children() == []


def sharding() -> jax.sharding.Sharding:
    mesh = jax.make_mesh((len(jax.devices()),), ("data",))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))


def test_device_prefetch_keeps_the_order_and_frees_its_thread(source: Source) -> None:
    order = Order(len(source), 64)
    threads = set(threading.enumerate())
    expected = take(train_batches(examples(source), order), 5)
    batches = device_prefetch(train_batches(examples(source), order, workers=1), sharding(), size=2)
    for batch in expected:
        ours = next(batches)
        assert ours.keys() == batch.keys()
        for key in batch:
            assert isinstance(ours[key], jax.Array) and ours[key].sharding == sharding()
            np.testing.assert_array_equal(ours[key], batch[key])
    batches.close()
    assert multiprocessing.active_children() == []
    assert next(batches, None) is None
    # Idle threads of Grain's pool may take a moment to go.
    wait_until(lambda: not set(threading.enumerate()) - threads)


def test_device_prefetch_ends_and_is_closed_when_dropped(source: Source) -> None:
    threads = set(threading.enumerate())
    batches = device_prefetch(eval_batches(examples(source), batch_size=720), sharding())
    assert len(list(batches)) == 2
    order = Order(len(source), 64)
    dropped = device_prefetch(train_batches(examples(source), order), sharding(), size=1)
    next(dropped)
    del dropped, batches
    wait_until(lambda: not set(threading.enumerate()) - threads)


HANGING = """
import multiprocessing, os, signal, sys, time

import jax
from stvit_jax.data import processes
from stvit_jax.data.loader import train_batches
from stvit_jax.data.order import Order
from stvit_jax.data.prefetch import device_prefetch
from stvit_jax.data.sources import open_source
from stvit_jax.errors import Interrupted
from tests.data.labelled import examples

HOW, HANGS = sys.argv[2], sys.argv[4]


class Hanging:
    # A source that never gives an example, from one on.
    def __init__(self, source, first):
        self.source, self.first, self.name = source, first, source.name

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        while index >= self.first:
            open(HANGS, "w").close()
            time.sleep(1)
        return self.source[index]

    def where(self, index):
        return self.source.where(index)


if __name__ == "__main__":
    workers = int(sys.argv[3])
    source = open_source("tfds", "digits", sys.argv[1], train=True)
    if HOW != "stop":
        source = Hanging(source, 0 if HOW == "hang at once" else 1400)
    processes.PATIENCE = 2
    batches = train_batches(examples(source), Order(1437, 64), workers=workers)
    mesh = jax.make_mesh((1,), ("data",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    prefetched = device_prefetch(batches, sharding, interrupted=lambda: os.path.exists(HANGS))
    try:
        while True:
            next(prefetched)
            assert len(processes.alive(batches._parts[0])) == workers
            if HOW == "stop":
                os.kill(multiprocessing.active_children()[-1].pid, signal.SIGSTOP)
                open(HANGS, "w").close()
    except Interrupted:
        print("interrupted", flush=True)
    start = time.monotonic()
    prefetched.close()
    assert time.monotonic() - start < 20
    if workers:
        assert multiprocessing.active_children() == []
    print("closed", flush=True)
    if not workers:
        os._exit(0)  # Python waits for a thread that hangs
"""


@pytest.mark.parametrize(
    ("how", "workers"),
    [
        ("stop", 2),
        pytest.param("hang", 1, marks=pytest.mark.slow),
        pytest.param("hang at once", 2, marks=pytest.mark.slow),
        ("hang", 0),
    ],
)
def test_data_that_hang_are_left(digits_dir: Path, tmp_path: Path, how: str, workers: int) -> None:
    """A worker that somebody stopped, and one that waits for ever."""
    done = run_script(HANGING, tmp_path, digits_dir, how, workers, tmp_path / "hangs")
    assert (done.returncode, done.stdout) == (0, "interrupted\nclosed\n"), done.stderr
    # A worker that had to be killed cannot give back its shared memory: Python's tracker does, and
    # may say so. Nothing else is said.
    said = [line for line in done.stderr.splitlines() if "resource_tracker" not in line]
    assert not [line for line in said if not line.startswith("  warnings.warn(")], done.stderr


def wait_until(condition, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


WORKERS_AND_SIGNALS = """
import multiprocessing, os, signal, sys
from stvit_jax.data.loader import train_batches
from stvit_jax.data.order import Order
from stvit_jax.data.sources import open_source
from tests.data.labelled import examples

if __name__ == "__main__":
    source = open_source("tfds", "digits", sys.argv[1], train=True)
    order = Order(len(source), 32)
    batches = train_batches(examples(source), order, workers=2)
    next(batches)
    workers = [process.pid for process in multiprocessing.active_children()]
    for pid in workers:
        os.kill(pid, signal.SIGINT)
        os.kill(pid, signal.SIGTERM)
    for _ in range(20):
        next(batches)
    with open(f"/proc/{workers[0]}/maps") as maps:
        assert "tensorflow" not in maps.read()
    print(*workers, flush=True)
    if sys.argv[2] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    os._exit(9)
"""


@pytest.mark.parametrize("end", ["kill", pytest.param("exit", marks=pytest.mark.slow)])
def test_workers_ignore_signals_and_end_with_their_parent(
    digits_dir: Path, tmp_path: Path, end: str
) -> None:
    ended = run_script(WORKERS_AND_SIGNALS, tmp_path, digits_dir, end)
    assert ended.returncode == (-9 if end == "kill" else 9), ended.stderr
    workers = ended.stdout.split()
    assert len(workers) == 2
    try:
        wait_until(lambda: not any(map(alive, workers)))
    finally:
        for pid in filter(alive, workers):
            os.kill(int(pid), signal.SIGKILL)


def alive(pid: str) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"  # an orphan may wait for a lazy init to collect it


def test_a_killed_worker_is_one_clear_error(source: Source) -> None:
    order = Order(len(source), 32)
    batches = train_batches(examples(source), order, workers=1)
    next(batches)
    (worker,) = multiprocessing.active_children()
    worker.kill()
    with pytest.raises(UserError, match=r"worker was killed.*lower data\.workers.*-9"):
        take(batches, 40)
