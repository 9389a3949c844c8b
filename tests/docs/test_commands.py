"""The documentation is followed to the letter: every command of a page, in order, in one folder.

Runs are shortened: a test adds `--config.steps` to `train.py`, and nothing else; but segmentation's
embedded default is run as it stands, and has a mark to reach.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from docs import make_api
from tests.program import ROOT, WITHOUT_TENSORFLOW, metrics

pytestmark = pytest.mark.docs

PAGES = ("getting_started", "finetuning", "weights", "using", "segmentation", "adding")
# Commands in blocks that are not run: where else they are, or why nowhere.
ELSEWHERE = {
    "python -m venv": "every CI run",
    "pip install -r": "every CI run",
    'python -c "import tensorflow_datasets': "tests/mini_imagenet.py does it in miniature",
    "python -m stvit_jax.data.array_record": "tests/data/test_records.py",
    "python -m stvit_jax.contact_sheet": "tests/test_contact_sheet.py",
    "python train.py --config configs/stvit_small.py": "tests/programs/test_imagenet.py",
    "python train.py --config configs/upernet_small.py": "tests/programs/test_scenes.py",
    "python convert_torch_weights.py": "tests/checkpoints/test_segmenter_weights.py",
    "python -m stvit_jax.export": "tests/test_segmenter_commands.py",
    "python examples/run_exported.py": "tests/test_segmenter_commands.py",
    "python -m benchmarks.program": "tests/test_compilers.py, tests/test_program_benchmark.py",
    "python -m benchmarks": "the tests of benchmarks",
    "apt-get install": "nobody: it is Debian's",
}


def blocks(page: str) -> list[tuple[str, str]]:
    """(language, text) of all blocks of a page."""
    text = (ROOT / "docs" / f"{page}.md").read_text()
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def followed(text: str) -> str:
    return re.sub(r"^(python train\.py .*)$", r"\1 --config.steps=2", text, flags=re.MULTILINE)


@pytest.fixture(scope="session")
def environment(tmp_path_factory) -> dict[str, str]:
    """Of commands: this Python, folders of their own, nothing from the network."""
    home = tmp_path_factory.mktemp("home")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    own = {"HOME": str(home), "PATH": path, "JAX_COMPILATION_CACHE_DIR": str(home / "compiled")}
    own["PYTHONPATH"] = f"{WITHOUT_TENSORFLOW['PYTHONPATH']}{os.pathsep}{ROOT}"
    return os.environ | own


@pytest.fixture(scope="session")
def first_run(tmp_path_factory, environment) -> Path:
    """The run that getting started ends with, and other pages begin with."""
    folder = tmp_path_factory.mktemp("first") / "digits"
    text = f"cd {ROOT} && python train.py --config configs/digits.py --workdir {folder}"
    run(f"{text} --config.steps=2", folder.parent, environment)
    return folder


@pytest.fixture
def reader(tmp_path: Path, request) -> Path:
    """What somebody has who reads: a checkout, pictures, and what pages before have left."""
    for entry in ROOT.iterdir():
        if entry.name not in (".git", "runs", "docs", "tests"):
            (tmp_path / entry.name).symlink_to(entry)
    digits, sizes = load_digits(), np.random.default_rng(0)
    for label in (3, 5, 7):
        for split, chosen in (("train", slice(0, 12)), ("val", slice(50, 56))):
            folder = tmp_path / "flowers" / split / f"flower_{label}"
            folder.mkdir(parents=True)
            for i in np.flatnonzero(digits.target == label)[chosen]:
                image = Image.fromarray((digits.images[i] / 16 * 255).astype(np.uint8))
                image.resize(sizes.integers(20, 60, 2)).save(folder / f"{i}.jpg")
    if request.node.callspec.params["page"] in ("finetuning", "weights", "using"):
        shutil.copytree(request.getfixturevalue("first_run"), tmp_path / "runs/digits")
        shutil.copytree(tmp_path / "flowers/val/flower_3", tmp_path / "pictures")
        for i, path in enumerate(sorted((tmp_path / "pictures").iterdir())):
            Image.open(path).save(tmp_path / "pictures" / f"{i + 1:02}.png")
    return tmp_path


def run(text: str, folder: Path, environment: dict[str, str]) -> str:
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_followed(page: str, reader: Path, environment) -> None:
    if page == "weights":
        torch = pytest.importorskip("torch")
        from benchmarks import torch_stvit

        network = torch_stvit.create_model("stvit_small")
        torch.save({"model": network.state_dict()}, reader / "stvit-small-224.pth")
    ran = 0
    for language, text in blocks(page):
        if language == "bash":
            run(text if page == "segmentation" else followed(text), reader, environment)
        elif language == "python":
            (reader / "block.py").write_text(text)
            run("python block.py", reader, environment)
        ran += language in ("bash", "python")
    assert ran >= 2
    if page == "segmentation":
        assert metrics(reader / "runs/scenes")[-1]["eval/miou"] >= 0.8


def test_links_and_pictures_are_there() -> None:
    shown = set()
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
            assert link.startswith("http") or (page.parent / link).exists(), f"{page}: {link}"
            shown.add((page.parent / link).resolve())
    assert {path.resolve() for path in (ROOT / "docs").glob("*.png")} <= shown


def test_commands_that_are_not_run_here_are_run_elsewhere() -> None:
    pages = [path.stem for path in (ROOT / "docs").glob("*.md")]
    assert set(PAGES) < set(pages)
    for page in pages:
        for language, text in blocks(page):
            if page in PAGES and language in ("bash", "python"):
                continue
            for line in text.splitlines():
                if re.match(r"(python|pip|apt-get|sbatch|kubectl) ", line):
                    assert any(line.startswith(start) for start in ELSEWHERE), f"{page}: {line}"


def test_the_reference_is_made_from_the_docstrings() -> None:
    assert make_api.PAGE.read_text() == make_api.page(), "run: python -m docs.make_api"
