"""compare, convert-adapter, push, verify-certificate, and manifests elsewhere, given what does not fit them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from specdef_cli.certify import CertifyOptions
from tests.commands import assert_refused, call_cli, snapshot
from tests.faults.small_attack import SMALL

FOLD = ("--method", "fold", "--quiet")
OUT = ("--out", "OUT")
QUICK = ("--formats", "none", "--no-curvature", "--quiet")


@pytest.fixture(scope="module")
def places(hardened: Path, text: Path, tiny_model: object, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base, what is made of it, an attack on that, and its certificate."""
    root = tmp_path_factory.mktemp("places")
    base = tiny_model("llama")  # type: ignore[operator]
    certified = Path(shutil.copytree(hardened, root / "certified"))
    apart = ("--out", root / "apart", "--manifest-out", root / "apart.json")
    for command in (
        ("harden", base, *FOLD, "--out", root / "fold"),
        ("harden", base, *FOLD, *apart),
        ("attack", certified, "--control", base, "--dataset", text, *SMALL, "--out", root / "attack"),
        (
            *("certify", certified, "--base", base, "--text", text, *QUICK, "--out", root / "certificate"),
            *("--attacks", root / "attack" / "report.json"),
        ),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("specdef_cli.certify.function._fresh_process", lambda *_: (True, ""))
            result = call_cli(*command)
        assert result.code == 0, result.stderr
    names = ("certified", "fold", "apart", "apart.json", "attack", "certificate")
    return {"BASE": base, "HARDENED": hardened, "TEXT": text, **{name.upper(): root / name for name in names}}


REFUSED: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "compare weights": (("compare", "BASE/model.safetensors"), ("not an attack report",)),
    "compare one that is broken, as JSON": (("compare", "ATTACK", "nowhere", "--json"), ("nowhere",)),
    "an attack for the card of a base": (
        ("attack", "BASE", "--control", "BASE", "--card", "--dataset", "TEXT", *SMALL, *OUT), ("specdef.json",),
    ),
    "push to no name": (("push", "HARDENED", ""), ("not the name of a repository", "org/name")),
    "push to a path": (("push", "HARDENED", "a/b/c"), ("'a/b/c'", "org/name")),
    "push to a branch": (("push", "HARDENED", "a/b@v1"), ("'a/b@v1'", "org/name", "--revision")),
    "push a file": (("push", "TEXT", "org/name"), ("is not a directory",)),
    "harden for a repository of no name": (
        ("harden", "BASE", *FOLD, "--out", "OUT", "--push-to-hub", "a b"), ("'a b'", "org/name"),
    ),
    "verify a file": (("verify-certificate", "CERTIFIED/certificate.json"), ("is a file",)),
    "verify with a report that is nowhere": (
        ("verify-certificate", "CERTIFIED", "--attacks", "nowhere"), ("no attack report nowhere",),
    ),
    "a fold's manifest for its base": (
        ("collapse", "BASE", "--manifest", "APART.JSON", "--out", "OUT"), ("multiplied by 2^", "and it is not"),
    ),
    "inspect a base with a fold's manifest": (
        ("inspect", "BASE", "--manifest", "APART.JSON"), ("multiplied by 2^", "specdef.json"),
    ),
    "attack a base with a fold's manifest": (
        (*("attack", "BASE", "--manifest", "APART.JSON", "--control", "BASE"), *("--dataset", "TEXT", *SMALL, *OUT)),
        ("multiplied by 2^",),
    ),
    "certify a base with a fold's manifest": (
        ("certify", "BASE", "--manifest", "APART.JSON", "--base", "BASE", "--text", "TEXT", *QUICK, "--out", "OUT"),
        ("multiplied by 2^",),
    ),
    "a manifest around the output": (
        ("harden", "BASE", *FOLD, "--out", "OUT/x", "--manifest-out", "OUT"), ("--manifest-out", "lies in"),
    ),
    "a manifest in the base": (
        ("harden", "BASE", *FOLD, "--out", "OUT", "--manifest-out", "BASE/specdef.json"), ("lies in the model",),
    ),
    "a control that is hardened": (
        ("attack", "FOLD", "--control", "HARDENED", "--dataset", "TEXT", *SMALL, "--out", "OUT"),
        ("--control", "hardened itself"),
    ),
    "a model against itself": (
        ("certify", "HARDENED", "--base", "HARDENED", "--text", "TEXT", *QUICK, "--out", "OUT"),
        ("--base", "hardened itself"),
    ),
    "a base that is another hardened model": (
        ("certify", "HARDENED", "--base", "FOLD", "--text", "TEXT", *QUICK, "--out", "OUT", "--dry-run"),
        ("--base", "hardened itself"),
    ),
}  # fmt: skip


def filled(arguments: tuple[str, ...], places: dict[str, Path], out: Path) -> list[str]:
    """Names in capitals, and what comes after a slash, as paths."""
    found = []
    for argument in arguments:
        first, slash, rest = argument.partition("/")
        place = {**places, "OUT": out}.get(first)
        found.append(argument if place is None else f"{place}{slash}{rest}")
    return found


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit(case: str, places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two lines, nothing written: not in the models either."""
    monkeypatch.chdir(tmp_path)
    before = {place: snapshot(place) for place in places.values() if place.is_dir()}
    arguments, words = REFUSED[case]
    code = 2 if "org/name" in words else 1  # a name that no repository can have
    assert_refused(call_cli(*filled(arguments, places, tmp_path / "out")), *words, empty=tmp_path, code=code)
    assert {place: snapshot(place) for place in before} == before


def test_a_base_in_a_folder(places: dict[str, Path]) -> None:
    """A base with a Hub id needs a folder of its own; on this disk it may be written either way."""
    base, folder = places["BASE"].parent, places["BASE"].name
    given = ("--base", base, "--base-subfolder", folder)
    result = call_cli("verify-certificate", places["CERTIFIED"], *given)
    assert result.code == 0, result.stdout
    planned = call_cli("certify", places["CERTIFIED"], *given, "--text", places["TEXT"], *QUICK, "--dry-run")
    assert planned.code == 0, planned.stderr
    options = CertifyOptions("hardened", base="org/b", base_subfolder="b/c/")
    assert (options.base, options.base_subfolder) == ("org/b", "b/c")
    alone = call_cli("certify", places["CERTIFIED"], "--base-subfolder", folder)
    assert_refused(alone, "--base-subfolder", "Give --base BASE", code=2)


def test_a_certificate_is_found_by_the_directory_of_its_report(places: dict[str, Path]) -> None:
    for report in (places["ATTACK"], places["ATTACK"] / "report.json"):
        result = call_cli("verify-certificate", places["CERTIFIED"], "--base", places["BASE"], "--attacks", report)
        assert result.code == 0, result.stdout
