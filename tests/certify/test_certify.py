"""The certificate of a sound checkpoint, and of ones that were tampered with: every claim must be able to fail."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from specdef_cli import AttackOptions, attack
from specdef_cli.certify import curvature as curvature_module
from specdef_cli.certify.certificate import digest_of
from specdef_cli.certify.curvature import CurvatureFigures, measure_curvature
from specdef_cli.checkpoint.manifest import read_manifest
from specdef_cli.checkpoint.stream import file_sha256
from specdef_cli.hardening.options import Factors, Fold, HardenOptions
from specdef_cli.hardening.run import harden
from specdef_cli.model import load_model
from specdef_cli.model.opened import open_model
from specdef_cli.report.files import write_report
from tests.commands import assert_refused, call_cli, succeed
from tests.hardening.mutations import edit_json, tensor

QUICK = ("--formats", "none", "--no-curvature")
NO_CARD = (*QUICK, "--no-card")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Words in a circle: at what these models have to learn of them, σ₁ is soon found."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(f"w{number % 90 + 3}" for number in range(3000)))
    return path


@pytest.fixture(scope="module", params=["factors", pytest.param("fold", marks=pytest.mark.slow)])
def attacked(
    request: pytest.FixtureRequest,
    tiny_model: Callable[..., Path],
    text: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, Path, Path]:
    """(base, hardened, report.json), by each method."""
    base, root = tiny_model("llama"), tmp_path_factory.mktemp(request.param)
    construction = Factors(top_k=4) if request.param == "factors" else Fold()
    assert harden(HardenOptions(str(base), root / "hardened", construction))
    report = attack(
        AttackOptions(
            model=root / "hardened", out=root / "attack", control=base, dataset=str(text), trainings=("full",), steps=2,
            learning_rates=(1e-2,), batch_size=2, sequence_length=8, eval_sequences=2, retained="none",
        )
    )  # fmt: skip
    write_report(report, root / "attack")
    return base, root / "hardened", root / "attack" / "report.json"


def certify(
    attacked: tuple[Path, Path, Path], text: Path, out: Path, *options: str, model: Path | None = None
) -> tuple[int, dict[str, Any]]:
    base, hardened, report = attacked
    given = ("--base", base, "--attacks", report, "--text", text, "--out", out, "--json")
    result = call_cli("certify", model or hardened, *given, *options)
    assert "Traceback" not in result.stderr, result.stderr
    return result.code, json.loads(result.stdout)


def verdicts(certificate: dict[str, Any]) -> dict[str, bool | None]:
    return {claim["name"]: claim["holds"] for claim in certificate["claims"]}


def test_a_sound_checkpoint(
    attacked: tuple[Path, Path, Path], text: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    hardened = shutil.copytree(attacked[1], tmp_path / "hardened")
    code, certificate = certify(attacked, text, tmp_path / "out", "--formats", "bfloat16", model=hardened)
    assert verdicts(certificate) == {"function": True, "spectrum": True, "curvature": True}
    assert code == 0
    function = certificate["function"]
    assert function["fresh_process_equal"]
    assert function["hardened_loss"] == pytest.approx(function["base_loss"], abs=1e-3)
    assert function["greedy_agreement"] == 1.0
    before, after = certificate["curvature"]
    # Of either sign: the model is no minimum.
    assert abs(after["top"]["eigenvalue"]) > 1e3 * abs(before["top"]["eigenvalue"])
    assert [figure["format"] for figure in certificate["deployment"]] == ["bfloat16"]
    written = json.loads((tmp_path / "out" / "certificate.json").read_text())
    assert written == certificate
    assert (written["format"], written["holds"]) == (3, True)
    assert json.loads((hardened / "certificate.json").read_text()) == written

    # The card tells what got through; a second certificate takes the place of the first, and collapse takes it away.
    card = (hardened / "README.md").read_text()
    informed = next(attack for attack in certificate["resistance"]["attacks"] if attack["knowledge"] == "construction")
    assert informed["label"] in card
    assert "secure" not in card.lower()
    request.getfixturevalue("no_fresh_process")
    certify(attacked, text, tmp_path / "again", *QUICK, model=hardened)
    card = (hardened / "README.md").read_text()
    assert card.count("### Certificate") == card.count("### Attacks") == card.count("## SpecDef") == 1
    assert "not measured" in card
    succeed("collapse", hardened, "--out", tmp_path / "back")
    assert "Certificate" not in (tmp_path / "back" / "README.md").read_text()
    assert not (tmp_path / "back" / "certificate.json").exists()


def check(directory: Path, *options: str | Path) -> tuple[int, dict[str, str]]:
    """The exit code of ``verify-certificate``, and what it says of each thing."""
    result = call_cli("verify-certificate", directory, *options, "--json")
    assert "Traceback" not in result.stderr, result.stderr
    return result.code, {check["name"].split(",")[0]: check["result"] for check in json.loads(result.stdout)["checks"]}


def write_sealed(directory: Path, certificate: dict[str, Any]) -> None:
    """A forged certificate whose digest was forged too."""
    text = json.dumps({**certificate, "digest": digest_of(certificate)})
    (directory / "certificate.json").write_text(text)


@pytest.fixture
def copied(certified: tuple[Path, Path], tmp_path: Path) -> Path:
    """The hardened directory with its certificate, to be spoiled."""
    return shutil.copytree(certified[0], tmp_path / "hardened")


@pytest.fixture(scope="module")
def certified(
    attacked: tuple[Path, Path, Path], text: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A hardened directory with its certificate, and where that was written."""
    root = tmp_path_factory.mktemp("certified")
    hardened = shutil.copytree(attacked[1], root / "hardened")
    base, _, report = attacked
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("specdef_cli.certify.function._fresh_process", lambda *_: (True, ""))
        by_directory = (base, hardened, report.parent)
        assert certify(by_directory, text, root / "out", *QUICK)[0] == 0
    return hardened, root / "out"


def test_a_certificate_is_checked_against_the_files(
    attacked: tuple[Path, Path, Path], certified: tuple[Path, Path], text: Path
) -> None:
    base, report = attacked[0], attacked[2]
    hardened, out = certified
    written = (hardened / "certificate.json").read_text()
    certificate = json.loads(written)
    assert (certificate["model"], certificate["base"]) == ("hardened", base.name)
    assert not [path for path in (out.parent, base.parent, attacked[1].parent, text.parent) if str(path) in written]
    hashes = certificate["provenance"]
    assert hashes["hardened"]["model.safetensors"] == file_sha256(hardened / "model.safetensors")
    assert hashes["base"]["model.safetensors"] == file_sha256(base / "model.safetensors")
    assert hashes["attack_report"] == file_sha256(report)
    assert hashes["text"] == file_sha256(text)
    code_of_its_own = ["configuration_specdef.py"] if read_manifest(hardened).factored else []
    decisive = ("config.json", "model.safetensors", *code_of_its_own)
    assert hashes["hardened"] == {name: file_sha256(hardened / name) for name in decisive}

    whole = ("--base", base, "--attacks", report)
    code, found = check(hardened, *whole)
    assert code == 0
    assert found.pop("outputs") == found.pop("who wrote it") == "not checked"
    assert set(found.values()) == {"matches"}
    code, found = check(hardened)
    assert code == 0
    unseen = {"base files", "attacks", "outputs", "who wrote it"}
    assert {name for name, result in found.items() if result == "not checked"} == unseen


def test_a_certificate_that_does_not_fit_differs(
    attacked: tuple[Path, Path, Path], copied: Path, tmp_path: Path
) -> None:
    base, _, report = attacked
    hardened = copied
    whole = ("--base", base, "--attacks", report)
    written = (hardened / "certificate.json").read_text()

    def differing(directory: Path, *options: str | Path) -> set[str]:
        code, found = check(directory, *options)
        assert code == 1
        return {name for name, result in found.items() if result == "differs"}

    other = tmp_path / "other.json"
    other.write_text(report.read_text() + " ")
    assert differing(hardened, "--base", hardened, "--attacks", other) >= {"base files", "attacks"}
    forged = json.loads(written)
    forged["function"]["outputs"] |= {"equal": False, "relative": 0.5}  # figures that the verdict beside them denies
    write_sealed(hardened, forged)
    assert differing(hardened, *whole) == {"verdicts"}
    write_sealed(hardened, {**json.loads(written), "holds": False})
    assert differing(hardened, *whole) == {"verdicts"}
    # A figure that no sentence quotes: the digest alone tells.
    edited = json.loads(written)
    edited["function"]["outputs"]["max_abs"] += 1.0
    (hardened / "certificate.json").write_text(json.dumps(edited))
    assert differing(hardened, *whole) == {"certificate"}
    (hardened / "certificate.json").write_text(written)

    inflated = [layer.inflated_tensor for layer in read_manifest(hardened).factored]
    changed = inflated[-1] if inflated else "model.layers.1.mlp.down_proj.weight"
    spoilt = tamper(hardened, tmp_path / "spoilt", changed, 1.5)
    assert differing(spoilt, *whole) == {"hardened files"}
    (spoilt / "specdef.json").unlink()
    code, found = check(spoilt, *whole)
    assert code == 1
    assert found["manifest"] == found["verdicts"] == "not checked"
    (spoilt / "certificate.json").write_text("{}")
    assert_refused(call_cli("verify-certificate", spoilt), "is not a certificate")
    (spoilt / "certificate.json").unlink()
    assert_refused(call_cli("verify-certificate", spoilt), "has no certificate.json", "specdef certify")


FORGERIES: dict[str, tuple[Callable[[dict[str, Any]], Any], set[str]]] = {
    "a curvature that nobody measured": (
        lambda it: it["claims"][-1].update(holds=True, sentence="σ₁ of the loss Hessian grew a million times."),
        {"verdicts", "model card"},
    ),
    "a claim of another name": (lambda it: it["claims"][-1].update(name="safety"), {"verdicts", "model card"}),
    "no claims at all": (lambda it: it["claims"].clear(), {"verdicts", "model card"}),
    "figures that no certificate has": (lambda it: it["spectrum"].update(folded_tensors="many"), {"verdicts"}),
    "an attack that is kinder than its report": (
        lambda it: it["resistance"]["attacks"][0].update(share=0.0, verdict="stopped"),
        {"attacks"},
    ),
    "an attack left out": (lambda it: it["resistance"]["attacks"].pop(), {"attacks"}),
    "a larger budget": (lambda it: it["resistance"].update(budget="1000000 steps"), {"attacks"}),
    "a format that its figures deny": (
        lambda it: it["deployment"].append(
            {"format": "float16", "tool": "transformers", "measure": "loss", "base": 2.0, "hardened": 9.0,
             "status": "kept", "note": ""}
        ),
        {"verdicts", "model card"},
    ),
    "another seed": (lambda it: it["provenance"].update(seed=it["provenance"]["seed"] + 1), {"manifest"}),
}  # fmt: skip


@pytest.mark.parametrize("forgery", FORGERIES)
def test_what_was_forged_differs(attacked: tuple[Path, Path, Path], copied: Path, forgery: str) -> None:
    certificate = json.loads((copied / "certificate.json").read_text())
    change, noticed = FORGERIES[forgery]
    change(certificate)
    write_sealed(copied, certificate)
    code, found = check(copied, "--base", attacked[0], "--attacks", attacked[2])
    assert code == 1
    assert {name for name, result in found.items() if result == "differs"} >= noticed


def test_a_figure_that_was_not_finite_is_no_forgery(copied: Path) -> None:
    certificate = json.loads((copied / "certificate.json").read_text())
    certificate["function"]["outputs"]["kl"] = None
    write_sealed(copied, certificate)
    code, found = check(copied)
    assert (code, found["verdicts"]) == (0, "not checked")


def test_a_card_that_says_otherwise_differs(copied: Path) -> None:
    card = copied / "README.md"
    written = card.read_text()
    card.write_text(written.replace("- curvature: not measured.", "- curvature: holds."))
    code, found = check(copied)
    assert (code, found["model card"]) == (1, "differs")
    card.write_text(re.sub("not slowed|not settled|slowed|stopped|unknown", "broken", written))  # as a later attack may
    code, found = check(copied)
    assert (code, found["model card"]) == (0, "not checked")


def test_code_that_a_model_brings_is_hashed_too(copied: Path) -> None:
    if not read_manifest(copied).factored:
        pytest.skip("a fold brings no code")
    with (copied / "configuration_specdef.py").open("a") as file:
        file.write("\n# and something else\n")
    code, found = check(copied)
    assert (code, found["hardened files"]) == (1, "differs")


@pytest.mark.usefixtures("no_fresh_process")
def test_changed_weights_fail(attacked: tuple[Path, Path, Path], text: Path, tmp_path: Path) -> None:
    """One matrix that hardening did not touch is another one: the function and the hash say so."""
    hardened = tamper(attacked[1], tmp_path / "hardened", "model.layers.1.self_attn.q_proj.weight", 1.5)
    # The report names the manifest, and the manifest is unchanged.
    code, certificate = certify(attacked, text, tmp_path / "out", *NO_CARD, model=hardened)
    assert code == 1
    assert verdicts(certificate)["function"] is False
    assert certificate["function"]["changed_files"] == ["model.safetensors"]
    assert not certificate["function"]["outputs"]["equal"]
    assert not (hardened / "certificate.json").exists()


def test_a_base_hardened_in_another_dtype_is_cast_to_it(
    tiny_model: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    base, hardened = tiny_model("llama"), tmp_path / "hardened"
    succeed("harden", base, "--out", hardened, "--dtype", "bfloat16", "--quiet")
    given = ("--base", base, "--text", text, "--out", tmp_path / "out", "--formats", "none", "--no-curvature")
    succeed("certify", hardened, *given)
    function = json.loads((hardened / "certificate.json").read_text())["function"]
    assert function["outputs"]["equal"]
    assert function["fresh_process_equal"]


@pytest.mark.usefixtures("no_fresh_process")
def test_weights_that_are_not_as_planned_fail(attacked: tuple[Path, Path, Path], text: Path, tmp_path: Path) -> None:
    """The function is kept, but a changed tensor is not what the manifest says: half as inflated, or not the base's."""
    manifest = read_manifest(attacked[1])
    hardened = shutil.copytree(attacked[1], tmp_path / "hardened")
    if manifest.factored:
        layer = manifest.factored[0]
        changed = {layer.inflated_tensor: 0.5, layer.compensation_tensor: 2.0}
    else:  # an even factor on a pair, which no output sees
        changed = {"model.layers.0.mlp.up_proj.weight": 2.0, "model.layers.0.mlp.down_proj.weight": 0.5}
    for name, factor in changed.items():
        tensor(name, lambda weight, factor=factor: weight * factor)(hardened)  # type: ignore[misc]
    edit_json("specdef.json", shards={"model.safetensors": file_sha256(hardened / "model.safetensors")})(hardened)
    report = attacked[2].read_text()
    relabelled = tmp_path / "report.json"
    relabelled.write_text(report.replace(open_model(attacked[1]).fingerprint, open_model(hardened).fingerprint))
    code, certificate = certify((attacked[0], hardened, relabelled), text, tmp_path / "out", *NO_CARD)
    assert code == 1
    assert verdicts(certificate) == {"function": True, "spectrum": False, "curvature": None}


def tamper(source: Path, target: Path, name: str, factor: float) -> Path:
    shutil.copytree(source, target)
    tensor(name, lambda weight: weight * factor)(target)
    return target


def test_refusals(attacked: tuple[Path, Path, Path], text: Path, tmp_path: Path) -> None:
    base, hardened, report = attacked
    other = shutil.copytree(hardened, tmp_path / "other")
    edit_json("specdef.json", seed=7)(other)
    out = tmp_path / "out"
    common = ("--out", out, "--text", text)
    assert_refused(call_cli("certify", other, "--base", base, "--attacks", report, *common), "report.json")
    assert_refused(call_cli("certify", base, "--base", base, *common), "specdef.json")
    document = json.loads(report.read_text())
    for run in document["runs"]:
        if run["spec"]["subject"] == "control":
            run["spec"]["checkpoint"] = "of a copy"
    (tmp_path / "report.json").write_text(json.dumps(document))
    quoting = ("certify", hardened, "--base", base, "--attacks", tmp_path / "report.json", "--dry-run", *common)
    assert call_cli(*quoting).code == 0
    for run in document["runs"]:
        run["loss"]["start"] *= 1.1 if run["spec"]["subject"] == "control" else 1.0
    (tmp_path / "report.json").write_text(json.dumps(document))
    assert_refused(call_cli(*quoting), "starts at another loss", "--control is the base")
    assert_refused(call_cli("certify", hardened, "--base", base, "--attacks", text, *common), "text.txt")
    assert not out.exists()


def test_what_is_too_large_for_the_whole_hessian_is_measured_by_layers(
    attacked: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = torch.randint(3, 90, (1, 8), generator=torch.Generator().manual_seed(0))
    whole = measure_curvature(load_model(attacked[1]), tokens)
    monkeypatch.setattr(curvature_module, "MAX_FOR_WHOLE", 10)
    told: list[str] = []
    largest = measure_curvature(load_model(attacked[1]), tokens, on_block=told.append)
    assert isinstance(whole, CurvatureFigures)
    assert isinstance(largest, CurvatureFigures)
    assert whole.block is None
    assert largest.block is not None
    assert "layers." in largest.block
    assert largest.block in told
    assert len(told) == len(set(told)) > 1
    assert largest.top.converged, "all blocks are measured roughly, and the largest is not"
    assert largest.top.parameters < whole.top.parameters
    # A diagonal block of a symmetric matrix; with inflated layers the largest one holds most of it.
    assert 0.1 * whole.top.value < largest.top.value <= whole.top.value * 1.001
