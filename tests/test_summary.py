"""Parameters and MACs against the table of the facts."""

from functools import partial

import pytest

import stvit_jax
from stvit_jax import command_line, summary

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


def test_command_prints_total_first_then_stem_to_head(capsys):
    summary.main(["stvit_small"])
    lines = capsys.readouterr().out.splitlines()[2:]
    assert lines[0].split() == ["total", "25,495,624", "4.367", "G"]
    assert [line[:10].strip() for line in lines[1:]] == [
        "stem",
        *(f"stage {i}" for i in (1, 2, 3, 4)),
        "head",
    ]


def test_unknown_name_is_one_line(capsys):
    with pytest.raises(SystemExit):
        command_line.entry(partial(summary.main, ["stvit_smal"]))
    assert "did you mean 'stvit_small'?" in capsys.readouterr().err
