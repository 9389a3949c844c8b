"""Commands of the documentation that are not run as it is followed: each names what runs it."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.test_commands import PAGES, SLOW, blocks
from tests.program import ROOT

# The tests that run the other commands, by how these begin.
FOLLOWED = "tests/docs/test_commands.py::test_a_page_is_followed"
PUBLISHED = "tests/programs/test_imagenet.py::test_a_published_command_at_64_pixels"
OTHER_SETS = "tests/data/test_sets.py::test_a_config_trains_and_evaluates"
EXPORTED_SCENES = (
    "tests/test_segmenter_commands.py::test_a_program_of_a_segmenter_runs_without_this_package"
)
SCENES_SHOWN = "tests/test_contact_sheet.py::test_scenes_are_shown_under_their_classes"
ELSEWHERE = {
    "python train.py --config configs/digits.py": FOLLOWED,
    "python train.py --config configs/finetune.py": (
        "tests/programs/test_finetune.py::test_a_folder_is_learned"
    ),
    "python train.py --config configs/digit_scenes.py": FOLLOWED,
    "python train.py --config configs/stvit_small.py": PUBLISHED,
    "python train.py --config configs/stvit_base.py": PUBLISHED,
    "python train.py --config configs/stvit_large.py": PUBLISHED,
    "python train.py --config configs/stvit_small.py:384": PUBLISHED,
    "python train.py --config configs/stvit_base.py:384": PUBLISHED,
    "python train.py --config configs/stvit_large.py:384": PUBLISHED,
    "python train.py --config configs/upernet_small.py": (
        "tests/programs/test_scenes.py::test_a_run_logs_measures_and_reports_every_class"
    ),
    "python train.py --config configs/upernet_small.py:fpn": (
        "tests/programs/test_scenes.py::test_semantic_fpn_trains_and_evaluates"
    ),
    "python train.py --config configs/cifar100.py": OTHER_SETS,
    "python train.py --config configs/inat2018.py": OTHER_SETS,
    "python train.py --config configs/fashion_mnist.py": OTHER_SETS,
    "python train.py --config configs/eval_robustness.py": (
        "tests/tasks/test_robustness.py::test_the_config_from_sets_and_weights_to_metrics"
    ),
    "python train.py ... --coordinator_address=HOST0:12345": (
        "tests/programs/test_cluster.py::test_two_processes_are_one_run"
    ),
    "python convert_torch_weights.py stvit-small-224.pth": FOLLOWED,
    "python convert_torch_weights.py runs/scenes": (
        "tests/checkpoints/test_segmenter_weights.py::test_the_workdir_of_a_run"
    ),
    "python -m stvit_jax.predict": FOLLOWED,
    "python -m stvit_jax.visualize": FOLLOWED,
    "python -m stvit_jax.plot": FOLLOWED,
    "python -m stvit_jax.export": (
        "tests/test_export.py::test_the_example_runs_without_flax_and_this_package"
    ),
    "python -m stvit_jax.export --weights runs/scenes": EXPORTED_SCENES,
    "python examples/run_exported.py scenes.stvit": EXPORTED_SCENES,
    "python run_exported.py": (
        "tests/test_export.py::test_the_example_runs_without_flax_and_this_package"
    ),
    "python -m examples.embed": "tests/docs/test_examples.py::test_embed_draws_neighbours",
    "python -m examples.dense": "tests/docs/test_examples.py::test_dense_learns",
    "python -m stvit_jax.summary stvit_small": (
        "tests/test_summary.py::test_command_prints_total_first_then_stem_to_head"
    ),
    "python -m stvit_jax.summary upernet:stvit_small": (
        "tests/test_summary.py::test_command_takes_segmenters_and_two_sides"
    ),
    "python -m stvit_jax.contact_sheet configs/stvit_small.py": (
        "tests/test_contact_sheet.py::test_the_published_recipe_shows_an_image_in_every_group"
    ),
    "python -m stvit_jax.contact_sheet configs/digit_scenes.py": SCENES_SHOWN,
    "python -m stvit_jax.contact_sheet configs/upernet_small.py": SCENES_SHOWN,
    'python -c "import tensorflow_datasets': (  # as mini_imagenet.prepare does
        "tests/programs/test_imagenet.py::test_trains_and_evaluates_from_tfds"
    ),
    "python -m stvit_jax.data.array_record": (
        "tests/data/test_prepared.py::test_tfrecord_becomes_array_record"
    ),
    "python -m stvit_jax.data.mnist": (
        "tests/data/test_mnist.py::test_every_image_lands_in_the_folder_of_its_label"
    ),
    "python -m benchmarks.model": (
        "tests/test_model_benchmark.py::test_the_command_without_tensorflow"
    ),
    "python -m benchmarks.ops": "tests/test_ops_benchmark.py::test_the_command",
    "python -m benchmarks.input": "tests/test_input_benchmark.py::test_the_command",
    "python -m benchmarks.program": (
        "tests/test_compilers.py::test_one_block_a_stage_compiles_and_moves_no_more_than_it_did"
    ),
    "python -m benchmarks.program --target h100 --model upernet:stvit_small": (
        "tests/test_program_benchmark.py::test_the_command_of_segmentation_up_to_the_compiler"
    ),
    "python -m benchmarks.pods": (
        "tests/test_program_benchmark.py::test_the_page_of_pods_has_the_committed_rows"
    ),
    "python -m docs.make_api": (
        "tests/docs/test_commands.py::test_the_reference_is_made_from_the_docstrings"
    ),
    "pip install .": "tests/docs/test_wheel.py::test_a_wheel_holds_the_package_and_works",
    "sbatch launch/slurm.sh": (
        "tests/programs/test_launch.py::test_under_slurm_it_stops_is_put_back_and_continues"
    ),
}
# What .ci/run has of the others.
IN_CI = {
    "python3.11 -m venv": "python3.11 -m venv",
    "python -m venv": "python3.11 -m venv",
    "pip install -r requirements.txt": "<!-- commands -->",  # as the README has it
    "pip install -r requirements-test.txt": "pip install -r requirements-test.txt",
    "pip install gcsfs": "pip install -r requirements-test.txt",  # which has these
    "pip install huggingface_hub": "pip install -r requirements-test.txt",
    "pip install 'jax2onnx<0.14' onnxruntime": "pip install -r requirements-test.txt",
    "pip install 'torch>=2.10'": "pip install -r requirements-test.txt",
    "pip install -r requirements-compilers.txt": "pip install -r requirements-compilers.txt",
    "ruff check .": "ruff check .",
    "ruff format .": "ruff format --check .",
    "pytest": "<!-- commands -->",
    "pytest -m 'compilers and not slow'": 'pytest -m "compilers and not slow" --dist load',
    "pytest -m 'docs and not slow'": 'pytest -m "docs and not slow"',
}
# What runs nowhere, and why.
NOWHERE = {
    "python train.py --config configs/NAME.py[:ARG]": "the form of all others",
    'pip install -U "jax[cuda12]"': "no GPU",
    'pip install -U "jax[tpu]"': "no TPU",
    "pytest -m slow": "hours, before a release",
    "pre-commit install": "changes the checkout",
    ".ci/run": "it is what runs",
    "apt-get install": "Debian's",
    "launch/tpu_vm.sh": "no slice; tests/programs/test_launch.py reads the script",
    "kubectl apply -f launch/gke.yaml": "no cluster; likewise",
}
PROGRAM = (
    r"(?:python[\d.]*|pip|pytest|ruff|pre-commit|apt-get|sbatch|kubectl|launch/\w+\.sh|\.ci/run)"
)


def commands(path: Path) -> Iterator[str]:
    """What a file says to type, but for blocks that are followed: in others, indented, in words."""
    text = path.read_text()
    if path.relative_to(ROOT).as_posix() in PAGES:
        text = re.sub(r"^```(bash|python)\n.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    text = text.replace("\\\n", " ")
    indent = "(?: {4,})?" if path.suffix in (".md", ".py") else ""  # in scripts that is a script
    lines = re.findall(rf"^{indent}({PROGRAM}(?: .*)?)$", text, re.MULTILINE)
    lines += re.findall(rf"`({PROGRAM}(?: [^`]*)?)`", text)
    for line in lines:
        yield from (part for part in line.split(" && ") if re.match(PROGRAM, part))


def begins(command: str, start: str) -> bool:
    """Whether the command is this one and more arguments."""
    return re.match(rf"{re.escape(start)}(?![\w:])", command) is not None


def test_every_command_has_its_test() -> None:
    known, used = ELSEWHERE | IN_CI | NOWHERE, set()
    files = (
        "README.md",
        "CONTRIBUTING.md",
        "docs/*.md",
        "launch/*",
        "configs/*.py",
        "examples/*.py",
    )
    for path in (path for pattern in files for path in ROOT.glob(pattern)):
        for command in commands(path):
            starts = [start for start in known if begins(command, start)]
            assert starts, f"{path}: name what runs: {command}"
            used.add(max(starts, key=len))
    assert used == known.keys(), f"nobody is told to type: {known.keys() - used}"


@pytest.mark.parametrize("node", sorted(set(ELSEWHERE.values())))
def test_a_test_that_is_named_is_there_and_not_slow(node: str) -> None:
    path, name = node.split("::")
    tree = ast.parse((ROOT / path).read_text())
    (test,) = (x for x in tree.body if isinstance(x, ast.FunctionDef) and x.name == name)
    of_file = (x for x in tree.body if isinstance(x, ast.Assign))
    marks = [x.value for x in of_file if ast.unparse(x.targets[0]) == "pytestmark"]
    for mark in map(ast.unparse, (*marks, *test.decorator_list)):
        # A parameter may be slow.
        assert "parametrize" in mark or not re.search(r"mark\.(slow|skip)", mark)


def test_pages_have_the_commands_that_they_are_said_to_have() -> None:
    followed = [block for page in PAGES if page not in SLOW for block in blocks(page)]
    lines = "".join(text for language, text in followed if language == "bash")
    for start in (start for start, node in ELSEWHERE.items() if node == FOLLOWED):
        assert any(begins(line, start) for line in lines.splitlines()), start


def test_ci_has_what_it_is_said_to_have() -> None:
    script = (ROOT / ".ci/run").read_text()
    for text in IN_CI.values():
        assert text in script
