"""`benchmarks.input`: what it needs, and that it runs both pipelines to the end."""

import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from benchmarks import input as benchmark
from stvit_jax.data.sources import open_source
from stvit_jax.errors import UserError
from tests.program import ROOT


def test_the_published_pipeline_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setitem(sys.modules, "timm.data", None)
    with pytest.raises(UserError, match="pip install --no-deps torchvision==0.28.0 timm==0.5.4"):
        benchmark.published()


def test_both_of_our_measures_load_every_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "BATCH", 8)
    source = open_source("fake", "", "", train=True)
    images = [source[index]["image"] for index in range(8)]
    made: list[np.ndarray] = []
    train_image = benchmark.train_image

    def recorded(*given: object) -> np.ndarray:
        made.append(train_image(*given))
        return made[-1]

    monkeypatch.setattr(benchmark, "train_image", recorded)
    for work in benchmark.ours(source):
        made.clear()
        speed = benchmark.measure({"": work}, images, rounds=2)[""]
        assert speed > 0
        assert [image.shape for image in made] == 3 * 8 * [(224, 224, 3)]  # one round to warm up
        assert len({image.tobytes() for image in made}) == len(made)


def assert_prints_both_ratios(said: str, count: int) -> None:
    for work in ("equal work", "whole host side"):
        assert re.search(rf"^{work}: published \d+, ours \d+, ratio \d+\.\d\d$", said, re.M)
    assert re.search(rf"^augmentation of {count} images on .+: [\d.]+ ms", said, re.M)


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Beside itself, and without RandAugment, which takes long to compile."""
    quick = partial(benchmark.augment_batch, randaugment=False)
    monkeypatch.setattr(benchmark, "augment_batch", quick)
    monkeypatch.setattr(benchmark, "BATCH", 4)
    source = open_source("fake", "", "", train=True)
    monkeypatch.setattr(benchmark, "published", lambda: benchmark.ours(source))
    benchmark.main(["--rounds", "1"])
    assert_prints_both_ratios(capsys.readouterr().out, 4)


@pytest.mark.slow
def test_the_benchmark_prints_both_ratios(tmp_path: Path) -> None:
    """Installs the published pipeline for itself."""
    packages = re.search(r"pip install (--no-deps .+)", benchmark.__doc__).group(1).split()
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(tmp_path)]
    subprocess.run([*pip, *packages], check=True, timeout=600)
    program = (
        "import sys; sys.path.append(sys.argv.pop(1)); from benchmarks.input import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path), "--rounds", "1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert_prints_both_ratios(done.stdout, 128)
