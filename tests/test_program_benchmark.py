"""`benchmarks.program` without a compiler: what it reads, says, and asks for."""

import json
from pathlib import Path

import pytest

from benchmarks import compilers, pods, program
from benchmarks.hlo import Collective, collectives, recomputed
from stvit_jax.errors import UserError
from tests.program import ROOT

LOOPS = """
HloModule jit_step

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
}

%body.1 (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %r = f32[4]{0:T(128)S(1)} all-reduce(%x), to_apply=%add
}

%condition.1 (p: (s32[], f32[4])) -> pred[] {
  %constant.3 = s32[]{:T(128)} constant(6)
  ROOT %lt = pred[] compare(%i, %constant.3), direction=LT
}

%wrapped (p: bf16[8]) -> bf16[1] {
  ROOT %rs = bf16[1]{0} reduce-scatter(%p), dimensions={0}, to_apply=%add
}

ENTRY %main (p: f32[4]) -> f32[4] {
  %w = (s32[], f32[4]{0}) while(%t), condition=%condition.1, body=%body.1, metadata={op_name="a"}
  %v = (s32[], f32[4]) while(%t), condition=%c, body=%body.1, config={"known_trip_count":{"n":"3"}}
  %s = ((bf16[8]), bf16[1], u32[]) async-start(%p), calls=%wrapped
  %g = (f32[2]{0}, f32[16]{0}) all-gather-start(%q), dimensions={0}
  %e = f32[16]{0} all-gather-done(%g)
  %m = (f32[5]{0}, f32[5]{0}, u32[], u32[]) collective-permute-start(%q), channel_id=1
  ROOT %r.1 = (f32[256,10]{0,1:T(8,128)S(1)}, /*index=1*/bf16[], s32[]) all-reduce(%a, %b, %c)
}
"""


def test_collectives_have_their_kind_type_size_and_number() -> None:
    assert collectives(LOOPS) == [
        Collective("all-reduce", "f32", 4, 16, 6),  # the loop's condition says so
        Collective("all-reduce", "f32", 4, 16, 3),  # the compiler says so
        Collective("reduce-scatter", "bf16", 1, 2),
        Collective("all-gather", "f32", 16, 64),
        Collective("collective-permute", "f32", 5, 20),
        Collective("all-reduce", "bf16+f32+s32", 2562, 10246),
    ]


def test_what_the_compiler_does_twice_is_counted() -> None:
    twice = """
  %fusion.3 = f32[4] fusion(%p), calls=%f
  %fusion.3.remat = (f32[4], f32[]) fusion(%p), calls=%f
  %gte.remat = f32[4] get-tuple-element(%fusion.3.remat), index=0
  ROOT %convert.1.remat2.1 = f32[4] convert(%fusion.3.remat)
"""
    assert recomputed(twice) == 2 and recomputed(LOOPS) == 0


def test_many_sizes_are_a_line_a_kind() -> None:
    one = Collective("all-reduce", "f32", 250_000, 1_000_000, 2)
    few = program.grouped([one, one])
    assert few == [
        {"bytes": 1000000, "elements": 250000, "kind": "all-reduce", "dtype": "f32", "count": 4}
    ]
    assert program.collective_lines(few)[1:] == ["  4 x all-reduce f32, 1.000 MB"]
    many = program.grouped(
        Collective("all-reduce", "bf16", n, 2 * n) for n in range(500, 20000, 500)
    )
    (line,) = program.collective_lines(many)[1:]
    assert line == "  39 x all-reduce bf16, 0.001 to 0.039 MB, 0.780 MB in all"
    assert program.collective_lines([]) == ["collectives a step: none"]


@pytest.mark.parametrize(
    "message, expected",
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm.",
            20.5,
        ),
        (
            "the total memory required for HLO temporaries (32.00G) exceeds available HBM (15.75G)",
            32,
        ),
        ("something else", None),
    ],
)
def test_what_a_program_without_room_would_need(message, expected) -> None:
    assert program.needed(message) == (expected and expected * 2**30)


@pytest.mark.parametrize(
    "target, message",
    [
        ("v5f:2x4", "--target v5f:2x4 is unknown; did you mean v5e? such as h100, h100:4, a100"),
        ("v5e", "--target v5e is no shape of v5e; such as"),
        ("h100:0", "--target h100:0 is no shape of h100"),
    ],
)
def test_a_target_is_known(target, message) -> None:
    with pytest.raises(UserError) as error:
        program.main(["--target", target, "--model", "stvit_tiny"])
    assert str(error.value).startswith(message)


def test_the_compiler_is_asked_for(monkeypatch) -> None:
    monkeypatch.setattr(compilers.importlib.metadata, "distributions", lambda: [])
    with pytest.raises(UserError, match="libtpu must be installed: .*requirements-compilers.txt"):
        program.main(["--target", "v5e:2x4", "--model", "stvit_tiny"])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "name a network, --model stvit_small, or a config"),
        (["--model", "stvit_tiny", "--config", "configs/digits.py"], "name a network"),
        (["--config", "configs/digit.py"], "there is no config 'configs/digit.py'"),
        (["--model", "stvit_tiny", "--depths", "1 1"], "--depths 1 1: write whole numbers"),
        (["--model", "stvit_tiny", "--batch-size", "100"], "must be a multiple of"),
        (["--model", "stvit_tiny", "--batch-size", "128", "--config.group_size=8"], None),
        (["--model", "stvit_tiny", "--batch-size", "4", "--config.group_size=4"], "by the 8 dev"),
        (["--model", "stvit_tiney"], "stvit_tiny"),
        (["--model", "unet:stvit_small"], "there is no config 'configs/unet_small.py'"),
    ],
)
def test_mistakes_are_named(arguments, message, monkeypatch) -> None:
    """Up to the compilation."""
    monkeypatch.setattr(compilers, "prepare", lambda target: None)
    monkeypatch.setattr(compilers, "devices", lambda target: [None] * 8)

    class Done(Exception):
        pass

    def described(*_: object) -> None:
        raise Done

    monkeypatch.setattr(program, "described", described)
    if message is None:
        with pytest.raises(Done):
            program.main(["--target", "v5e:2x4", *arguments])
        return
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        program.main(["--target", "v5e:2x4", *arguments])


@pytest.mark.parametrize(
    "model, path, changes",
    [
        ("stvit_base", "configs/stvit_base.py", []),
        ("upernet:stvit_large", "configs/upernet_large.py", []),
        ("fpn:stvit_base", "configs/upernet_base.py:fpn", []),
        ("fpn:stvit_tiny", "configs/upernet_small.py:fpn", ["--config.model.name=stvit_tiny"]),
    ],
)
def test_a_network_has_its_recipe(model, path, changes) -> None:
    assert program.recipe(model) == (path, changes)


def test_a_row_is_told_whether_it_fits_or_not(monkeypatch, tmp_path, capsys) -> None:
    """Rows append; one without room has the compiler's word for it."""
    import jax

    monkeypatch.setattr(compilers, "prepare", lambda target: None)
    monkeypatch.setattr(compilers, "devices", lambda target: jax.devices()[:1])
    monkeypatch.setattr(program.importlib.metadata, "version", lambda name: "0")
    narrow = ["--model", "stvit_tiny", "--config.image_size=32", "--config.group_size=4"]
    narrow += ["--config.model.embed_dim=(8,8,16,16)", "--config.model.num_heads=(1,1,2,2)"]
    narrow += ["--batch-size", "4", "--depths", "1,1,1,1", "--mode", "infer"]
    command = ["--target", "v5e:1x1", *narrow, "--json", str(tmp_path / "rows.jsonl")]
    program.main([*command, "--dump-hlo", str(tmp_path / "program.txt")])
    assert (tmp_path / "program.txt").read_text().startswith("HloModule")
    assert ": fits" in (said := capsys.readouterr().out) and "collectives a step: none" in said

    def full(_: object) -> None:
        raise jax.errors.JaxRuntimeError("Ran out of memory. Used 20.50G of 15.75G hbm")

    monkeypatch.setattr(compilers.Program, "compile", full)
    program.main(command)
    assert "20.5 of 16 GiB: does not fit" in capsys.readouterr().out
    first, second = map(json.loads, Path(tmp_path / "rows.jsonl").read_text().splitlines())
    assert first["fits"] and first["depths"] == [1, 1, 1, 1] and first["flops_per_image"] > 0
    assert not second["fits"] and second["peak_bytes"] == 20.5 * 2**30


@pytest.mark.docs
def test_the_command_of_segmentation_up_to_the_compiler(monkeypatch) -> None:
    """The step is what the recipe says, on an H100; tests of compilers go on from there."""
    import jax

    seen = {}

    class Done(Exception):
        pass

    def compile(self: compilers.Program) -> None:
        seen["program"] = self
        raise Done

    monkeypatch.setattr(compilers, "prepare", lambda target: None)
    monkeypatch.setattr(compilers, "devices", lambda target: jax.devices()[:1])
    monkeypatch.setattr(program, "described", lambda config, *_: seen.update(config=config) or {})
    monkeypatch.setattr(compilers.Program, "compile", compile)
    command = ["--target", "h100", "--model", "upernet:stvit_small", "--mode", "train"]
    with pytest.raises(Done):
        program.main([*command, "--batch-size", "16", "--depths", "1,1,1,1"])
    config = seen["config"]
    assert (config.task, config.segmentation.head) == ("segmentation", "upernet")
    assert (config.model.depths, config.image_size) == ((1, 1, 1, 1), 512)
    assert seen["program"].batch_size == 16


def test_the_page_of_pods_has_the_committed_rows(capsys) -> None:
    """docs/pods.md is `benchmarks.pods` of docs/pods.jsonl, and words."""
    pods.main([str(ROOT / "docs/pods.jsonl")])
    assert capsys.readouterr().out in (ROOT / "docs/pods.md").read_text()


def test_a_row_without_room_is_told_with_what_is_known() -> None:
    row = {"model": "stvit_base", "target": "v5e:2x4", "chips": 8, "batch_size": 1024}
    row |= {
        "mode": "infer",
        "depths": [1, 1, 2, 1],
        "remat": [0, 1],
        "accumulation": 4,
        "compile_seconds": 300,
    }
    row |= {"fits": False, "peak_bytes": None, "chip_bytes": 2**34}
    assert pods.table([row])[2] == (
        "| base | v5e:2x4 | 128 | `--mode infer --depths 1,1,2,1 --remat 0,1 --accumulation 4` "
        "| - of 16 | **no** | - | - | - | - | 300 |"
    )
    row |= {"error": "(16.69G) exceeds available HBM", "peak_bytes": 17 * 2**30}
    assert "| > 17.0 of 16 | **no** |" in pods.table([row])[2]
