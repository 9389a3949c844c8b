"""Parameters and MACs against the table of the facts."""

from functools import partial

import pytest

import stvit_jax
from stvit_jax import command_line, summary
from stvit_jax.errors import UserError

TABLE = {  # parameters, GMACs at 224, at 384
    "stvit_small": (25_495_624, 4.367, 14.156),
    "stvit_base": (51_691_288, 9.872, 31.489),
    "stvit_large": (94_971_096, 15.597, 49.748),
}


@pytest.mark.parametrize("name", TABLE)
def test_parameters_and_macs(name):
    parameters, *macs = TABLE[name]
    for size, expected in zip((224, 384), macs, strict=True):
        total, *parts = summary.summarize(stvit_jax.create_model(name), size)
        assert total[1] == parameters == sum(part[1] for part in parts)
        assert total[2] == sum(part[2] for part in parts)
        assert total[2] / 1e9 == pytest.approx(expected, rel=1e-3)


SEGMENTERS = {  # head, backbone, norms, auxiliary, neck of Semantic FPN
    "stvit_small": (29_711_510, 23_943_264, 2_048, 776_342, 2_623_488),
    "stvit_base": (29_793_430, 50_138_928, 2_368, 923_798, 2_664_448),
    "stvit_large": (30_678_166, 93_287_664, 2_752, 1_071_254, 2_713_600),
}
FPN_HEAD = 1_643_158
TOTALS = {"stvit_small": (53.65, 54.43, 28.21), "stvit_base": (79.93, 80.86, 54.45)}
# UPerNet, with its auxiliary head, Semantic FPN; in millions, without norms.
TOTALS["stvit_large"] = (123.97, 125.04, 97.64)
HEADS_GMACS = {"stvit_small": (210.6, 842.4), "stvit_base": (211.1, 844.2)}
HEADS_GMACS["stvit_large"] = (211.2, 844.9)
WIDE = (512, 2048)
CELLS = ((8, 4, 1, 1), (8, 4, 2, 1), (16, 8, 2, 1))
BACKBONES = {  # GMACs by cell sizes at 512 x 512, of which the facts have two, and at 512 x 2048
    "stvit_small": {512: (27.7, None, 19.3), WIDE: (187.1, 86.2, 84.1)},
    "stvit_base": {512: (60.9, None, 44.0), WIDE: (386.1, 193.5, 189.4)},
    "stvit_large": {512: (96.3, None, 68.1), WIDE: (610.1, 298.6, 293.9)},
}


@pytest.fixture
def traced_once(monkeypatch):
    """A network's variables do not depend on its super tokens, and tracing it takes seconds."""
    known, abstract = {}, summary.abstract

    def once(model):
        if model.kind not in known:
            known[model.kind] = abstract(model)
        return known[model.kind]

    monkeypatch.setattr(summary, "abstract", once)


@pytest.mark.usefixtures("traced_once")
@pytest.mark.parametrize("name", SEGMENTERS)
def test_segmenters(name):
    head, backbone, norms, auxiliary, neck = SEGMENTERS[name]
    model = stvit_jax.create_segmenter("upernet", name)
    rows = {row[0]: row[1] for row in summary.summarize(model, 512)}
    stages = sum(count for part, count in rows.items() if part.startswith("st"))
    assert stages == backbone
    assert (rows["norms"], rows["upernet"], rows["auxiliary"]) == (norms, head, auxiliary)
    assert rows["total"] == head + backbone + norms
    totals = [rows["total"] - norms, rows["total"] - norms + auxiliary]
    model = stvit_jax.create_segmenter("fpn", name)
    rows = {row[0]: row[1] for row in summary.summarize(model, 512)}
    assert (rows["neck"], rows["fpn"]) == (neck, FPN_HEAD)
    assert list(rows)[-3:] == ["norms", "neck", "fpn"]
    totals.append(rows["total"] - norms)
    assert tuple(round(count / 1e6, 2) for count in totals) == TOTALS[name]

    for i, cells in enumerate(CELLS):
        model = stvit_jax.create_segmenter("upernet", name, stoken_size=cells)
        for size, of_head in zip((512, WIDE), HEADS_GMACS[name], strict=True):
            macs = {row[0]: row[2] / 1e9 for row in summary.summarize(model, size)}
            assert round(macs["upernet"], 1) == of_head
            stages = sum(value for part, value in macs.items() if part.startswith("st"))
            assert BACKBONES[name][size][i] in (round(stages, 1), None)
            assert macs["total"] == pytest.approx(macs["upernet"] + stages)


def test_command_prints_total_first_then_stem_to_head(capsys):
    summary.main(["stvit_small"])
    lines = capsys.readouterr().out.splitlines()[2:]
    assert lines[0].split() == ["total", "25,495,624", "4.367", "G"]
    assert [line[:10].strip() for line in lines[1:]] == [
        "stem",
        *(f"stage {i}" for i in (1, 2, 3, 4)),
        "head",
    ]


def test_command_takes_segmenters_and_two_sides(capsys):
    summary.main(["upernet:stvit_small", "--image-size", "64", "96"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "upernet:stvit_small at 64 x 96"
    assert [line.split()[0] for line in lines[-3:]] == ["norms", "upernet", "auxiliary"]
    with pytest.raises(UserError, match="unknown head 'fpm'; did you mean 'fpn'"):
        summary.main(["fpm:stvit_tiny"])
    with pytest.raises(UserError, match="--image-size is 1 2 3"):
        summary.main(["stvit_tiny", "--image-size", "1", "2", "3"])


def test_unknown_name_is_one_line(capsys):
    with pytest.raises(SystemExit):
        command_line.entry(partial(summary.main, ["stvit_smal"]))
    assert "did you mean 'stvit_small'?" in capsys.readouterr().err
