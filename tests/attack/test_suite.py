"""Suites as files: what they may say, and what is said of those that say something else."""

from __future__ import annotations

from pathlib import Path

import pytest

from specdef_cli.attack.options import load_suite, suite_names
from specdef_cli.attack.trainings import Training
from specdef_cli.attack.variants import Variant
from specdef_cli.errors import SpecDefError


def test_the_packages_suites_can_be_read_and_grow() -> None:
    assert suite_names() == ("full", "quick", "standard")
    sizes = {
        name: sum(
            len(table.trainings) * len(table.optimizers) * len(table.variants) for table in load_suite(name).attacks
        )
        for name in suite_names()
    }
    assert sizes["quick"] < sizes["standard"] < sizes["full"]
    for name in suite_names():
        assert any("informed" in table.variants for table in load_suite(name).attacks)


def test_a_file_of_the_users(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("""
[budget]
steps = 12
[[attacks]]
trainings = ["lora:4", { training = "full@*norm*", name = "norms" }]
optimizers = ["sgd"]
variants = ["plain", "informed", "width:1.5"]
learning_rates = [1e-3, 1e-5]
""")
    suite = load_suite(str(path))
    assert (suite.name, suite.budget) == ("mine", {"steps": 12})
    (table,) = suite.attacks
    assert table.trainings == (Training("lora", 4), Training(where=("*norm*",)))
    assert table.trainings[1].label == "norms"
    assert table.variants == (Variant(), "informed", Variant("width", 1.5))
    assert (table.optimizers, table.learning_rates) == (("sgd",), (1e-3, 1e-5))


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[[attacks]]\ntrainings = ['lorra']", "lorra"),
        ("[[attacks]]\noptimizers = ['magic']", "magic"),
        ("[[attacks]]\nvariants = ['width:0.5']", "0.5"),
        ("[[attacks]]\nvariants = ['collapse:2']", "collapse"),
        ("[[attacks]]\nlearning_rates = 'everything'", "everything"),
        ("[[attacks]]\nlearning_rates = [-1]", "-1"),
        ("[[attacks]]\nspeed = 3", "speed"),
        ("[[attacks]]\ntrainings = [{ training = 'full', rnak = 3 }]", "rnak"),
        ("[[attacks]]\ntrainings = ['last-half@x']", "last-half"),
        ("[budget]\nsteps = 0\n[[attacks]]", "steps"),
        ("[budget]\npatience = 3\n[[attacks]]", "patience"),
        ("attacks = []", "at least 1 item"),
        ("[budget]\nsteps = 3", "attacks"),
        ("[[attacks]\n", "not a suite"),
        ("[more]\n[[attacks]]", "more"),
    ],
)
def test_refusals_name_the_value(tmp_path: Path, text: str, named: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(SpecDefError) as caught:
        load_suite(str(path))
    assert named in caught.value.problem


def test_a_suite_that_does_not_exist() -> None:
    with pytest.raises(SpecDefError, match="hard") as caught:
        load_suite("hard")
    assert "standard" in caught.value.hint
