"""The documentation is followed to the letter: every command of a page, in order, in one folder.

Runs are shortened: a test adds `--config.steps` to `train.py`, and nothing else; but segmentation's
embedded default is run as it stands, and has a mark to reach.
Where commands run that are on no such page, test_elsewhere.py holds.
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

from tests.program import ROOT, WITHOUT_TENSORFLOW, metrics

pytestmark = pytest.mark.docs

PAGES = (
    "README.md",
    "docs/getting_started.md",
    "docs/finetuning.md",
    "docs/weights.md",
    "docs/using.md",
    "docs/recipe.md",
    "docs/segmentation.md",
    "docs/adding.md",
)
# Followed before a release: several programs each.
SLOW = ("docs/finetuning.md", "docs/using.md", "docs/adding.md")
# What pages say is there at their end, beside what their commands name as output.
PROMISED = {
    "docs/finetuning.md": [
        f"runs/flowers/{name}" for name in ("confusion.png", "per_class.json", "best.json")
    ],
    "docs/weights.md": [
        f"shared/{of}/{name}"
        for of in ("stvit_small", "digits")
        for name in ("model.safetensors", "config.json")
    ],
    "docs/segmentation.md": ["answers/scene_0000.png", "answers/scene_0000.overlay.png"],
}
# As train.py reads a config.
READ_CONFIG = """
import sys
from stvit_jax import command_line, validation
validation.validate(command_line.read_config(sys.argv[1], []))
"""


def blocks(page: str) -> list[tuple[str, str]]:
    """(language, text) of all blocks of a page."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


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
    if Path(request.node.callspec.params["page"]).stem in ("finetuning", "weights", "using"):
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
        timeout=3000,
    )
    assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=pytest.mark.slow) if page in SLOW else page for page in PAGES]
)
def test_a_page_is_followed(page: str, reader: Path, environment) -> None:
    if page in ("README.md", "docs/weights.md"):
        torch = pytest.importorskip("torch")
        from benchmarks import torch_stvit

        network = torch_stvit.create_model("stvit_small")
        torch.save({"model": network.state_dict()}, reader / "stvit-small-224.pth")
    if page == "docs/segmentation.md":  # its training is no matter of seconds: as XLA does it
        environment = environment | {"XLA_FLAGS": ""}
    ran, promised = 0, [*PROMISED.get(page, ())]
    for language, text in blocks(page):
        if language == "bash":
            text = text if page == "docs/segmentation.md" else followed(text)
            run(text, reader, environment)
            promised += re.findall(r"(?:--output|--workdir| >) (\S+)", text)
        elif language == "python":
            (reader / "block.py").write_text(text)
            run("python block.py", reader, environment)
            if "def get_config" in text:
                run(f"python -c '{READ_CONFIG}' block.py", reader, environment)
        elif language == "text":
            promised += re.findall(r"^(runs/\S+\w)(?<!/176) ", text, re.MULTILINE)
        ran += language in ("bash", "python")
    assert ran
    for name in promised:
        path = reader / name
        assert path.stat().st_size and (path.is_file() or any(path.iterdir())), name
    if page == "docs/segmentation.md":
        assert metrics(reader / "runs/scenes")[-1]["eval/miou"] >= 0.8


def test_links_and_pictures_are_there() -> None:
    shown = set()
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for link, part in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", page.read_text()):
            if link.startswith("http"):
                continue
            path = (page.parent / link if link else page).resolve()
            assert path.exists(), f"{page}: {link}"
            assert not part or part in headings(path), f"{page}: {link}#{part}"
            shown.add(path)
    assert {path.resolve() for path in (ROOT / "docs").glob("*.png")} <= shown


def headings(page: Path) -> list[str]:
    """As GitHub makes links of them."""
    found = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in found]


def test_the_reference_is_made_from_the_docstrings(tmp_path: Path, environment) -> None:
    (tmp_path / "docs").mkdir()
    shutil.copy(ROOT / "docs/make_api.py", tmp_path / "docs")
    run("python -m docs.make_api", tmp_path, environment)
    made = (tmp_path / "docs/api.md").read_text()
    assert made == (ROOT / "docs/api.md").read_text(), "run: python -m docs.make_api"
