"""The house: imports between its rooms go one way, and a wing alone imports its libraries."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from stvit_jax.tasks import TASKS

PACKAGE = Path(__file__).parents[1] / "stvit_jax"
GROUND = {"errors", "console", "trees", "parallel", "programs", "places", "cluster"}
HALL = {"run", "following", "trainer", "evaluator", "plans", "config", "command_line"}
HALL |= {"validation", "recipes"}
LEAVES = {"schedules", "torch_weights", "inference", "predict_scenes"}  # of the door
WINGS = {"ops", "models", "data", "augment", "checkpoints", "training", "tasks", "portable"}

# A room, or a wing, and what its files may import of the project; every one its own wing. The
# longest name that fits counts.
ARROWS = {
    "errors": set(),
    **dict.fromkeys(("console", "trees", "places"), {"errors"}),
    **dict.fromkeys(("parallel", "programs"), {"errors", "console", "places"}),
    "cluster": {"errors", "console"},
    "config": {"errors"},
    "validation": {"config", "errors", "places"},
    "recipes": {"config", "errors"},
    "command_line": {"config"} | GROUND,
    "following": {"evaluator", "training", "checkpoints", "models.settings"} | GROUND,
    "run": {"tasks", "following", "trainer", "evaluator", "training", "data", "validation"}
    | GROUND,
    "trainer": {"evaluator", "plans", "training", "checkpoints", "data", "config"}
    | {"models.settings"}
    | GROUND,
    "evaluator": {"training", "checkpoints", "data"} | GROUND,
    "plans": {"training", "data", "schedules"} | GROUND,
    "schedules": GROUND,
    "torch_weights": {"torch_heads", "torch_rules"} | GROUND,
    "torch_heads": {"torch_rules"},
    "torch_rules": GROUND,
    "ops": GROUND,
    "models": {"ops"} | GROUND,
    "data": GROUND,
    **dict.fromkeys(("data.array_record", "data.mnist"), {"command_line"} | GROUND),  # commands
    "augment": {"data.normalization"} | GROUND,
    "checkpoints": {"models.settings", "models.stvit", "torch_weights"} | GROUND,
    "checkpoints.pretrained": {"data.decode", "data.normalization"}  # what config.json says of them
    | {"models.settings", "models.stvit", "torch_weights"}
    | GROUND,
    "training": {"checkpoints.manager", "schedules"} | GROUND,
    "training.task": {"data.examples", "checkpoints.weights"},  # their types
    "training.signals": {"console"},  # before anything heavy is imported
    "tasks": {
        "figures",
        "models",
        "ops",
        "data",
        "augment",
        "checkpoints.fit",
        "checkpoints.weights",
        "config",
    }
    | {"schedules", "training.task"}
    | GROUND,
    "figures": {"errors", "places"},
    "portable": {"checkpoints.trained", "data.decode", "data.imagenet_names"}
    | {"data.class_lists", "data.normalization"}
    | GROUND,
    # Commands at the door, one thin file each; never `run`.
    "": {"following", "figures", "ops", "tasks", "models", "portable", "checkpoints", "data"}
    | {"training.task", "command_line", "validation"}
    | LEAVES
    | GROUND,
}
# A library, and the wings that alone import it.
LIBRARIES = {
    "flax": {"models", "training.step"},
    "orbax": {"checkpoints", "cluster"},
    "safetensors": {"checkpoints"},
    "huggingface_hub": {"checkpoints.hub"},
    "torch": {"checkpoints"},
    "grain": {"data"},
    "tensorflow_datasets": {"data"},
    "array_record": {"data"},
    "PIL": {"data", "contact_sheet", "figures", "visualize"},
    "matplotlib": {"figures", "visualize"},
    "simplejpeg": {"data"},
    "cykooz_resizer": {"data"},
    "clu": {"training.metrics"},
    "etils": {"places", "data"},
    **dict.fromkeys(("fsspec", "aiohttp", "gcsfs"), {"places"}),
    "optax": {"training", "tasks", "plans"},
    "ml_collections": {"config", "command_line", "tasks", "run", "contact_sheet"}
    | {"trainer", "evaluator", "plans", "following", "validation", "recipes"},
    "absl": {"command_line", "data", "checkpoints"},
}
# Loader workers and command lines import these: no JAX when they are imported.
LIGHT = GROUND | {"config", "command_line", "data", "training.signals"}
LIGHT |= {"torch_weights", "torch_heads", "torch_rules"}
# Where it is known that there are several tasks, and which.
OF_TASKS = {"config", "validation", "recipes", "tasks"}
CONFIGS = {"config", "c"}  # what configs are called


def rooms() -> Iterator[tuple[str, Path]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if name := ".".join(part for part in parts if part != "__init__"):
            yield name, path


def imports(path: Path, top_level: bool = False) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import; `from x import y` counts as x.y."""
    tree = ast.parse(path.read_text())
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def within(name: str, places: set[str]) -> bool:
    return any(name == place or name.startswith(f"{place}.") for place in places)


def row_of(room: str) -> str:
    return max((row for row in ARROWS if not row or within(room, {row})), key=len)


def violations(package: Iterator[tuple[str, Path]]) -> list[str]:
    found = []
    for room, path in package:
        wing = room.split(".")[0]
        own = {wing} if wing in WINGS else set()
        for line, name in imports(path):
            library, _, rest = name.partition(".")
            if library == "stvit_jax" and rest and not within(rest, ARROWS[row_of(room)] | own):
                found.append(f"{path.name}:{line}: {room} must not import {rest}")
            if not within(room, LIBRARIES.get(library, {room})):
                found.append(f"{path.name}:{line}: {room} must not import {library}")
        for line, name in imports(path, top_level=True):
            if name.split(".")[0] == "jax" and within(room, LIGHT):
                found.append(f"{path.name}:{line}: {room} must not import JAX when it is imported")
    return found


def test_imports_go_one_way() -> None:
    assert not violations(rooms())


@pytest.mark.parametrize(
    "room, line",
    [
        ("training.loop", "from stvit_jax.tasks import classification"),
        ("training.loop", "from stvit_jax.data.loader import Batches"),
        ("data.order", "import jax"),
        ("data.order", "from stvit_jax.models.stvit import STViT"),
        ("ops.depthwise", "import flax.linen as nn"),
        ("models.stvit", "def f():\n    from stvit_jax import run"),
        ("summary", "from stvit_jax.run import run"),
        ("errors", "from stvit_jax import console"),
        ("checkpoints.fit", "from stvit_jax.training import loop"),
        ("tasks.classification", "import torch"),
    ],
)
def test_a_wrong_import_is_found(room: str, line: str, tmp_path: Path) -> None:
    path = tmp_path / "room.py"
    path.write_text(f"{line}\n")
    assert len(violations(iter([(room, path)]))) == 1


def told_apart(package: Iterator[tuple[str, Path]]) -> list[str]:
    """Where `config.task` is read, or something compared with a task's name, outside of OF_TASKS.

    A section of the config may have the name of a task.
    """
    found = []
    for room, path in package:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                holder = ast.unparse(node.value).split(".")[-1].strip("_")
                wrong = node.attr == "task" and holder in CONFIGS
            elif isinstance(node, ast.Compare | ast.match_case):
                inside = (n for n in ast.walk(node) if isinstance(n, ast.Constant))
                wrong = any(n.value in TASKS for n in inside if isinstance(n.value, str))
            else:
                wrong = isinstance(node, ast.Constant) and node.value == "task"
            if wrong and not within(room, OF_TASKS):
                found.append(f"{path.name}: {room} must not tell tasks apart: {ast.unparse(node)}")
    return found


def test_tasks_are_told_apart_in_their_room_only() -> None:
    assert not told_apart(rooms())


@pytest.mark.parametrize(
    "room, line, expected",
    [
        ("training.loop", "if config.task == 1: pass", 1),
        ("trainer", "def f(self): return self._config.task", 1),
        ("evaluator", "f = lambda c: c.task != 'segmentation'", 2),
        ("run", "x = getattr(config, 'task')", 1),
        ("plans", "if kind in ('segmentation', 'x'): pass", 1),
        ("plans", "match kind:\n  case 'segmentation': pass", 1),
        ("following", "before['segmentation']['head']", 0),
        ("trainer", "def f(self): return self._task.train", 0),
        ("tasks.segmentation", "config.task", 0),
    ],
)
def test_who_tells_tasks_apart_is_found(
    room: str, line: str, expected: int, tmp_path: Path
) -> None:
    path = tmp_path / "room.py"
    path.write_text(f"{line}\n")
    assert len(told_apart(iter([(room, path)]))) == expected
