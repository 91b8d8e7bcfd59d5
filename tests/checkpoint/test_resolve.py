"""From a Hub id to a directory: out of a cache, and from a server on this machine that speaks the Hub's language."""

from __future__ import annotations

from pathlib import Path

import pytest

from specdef_cli.checkpoint.resolve import resolve
from specdef_cli.errors import SpecDefError
from tests.commands import assert_refused, call_cli, refusal
from tests.hub_server import COMMITS, Hub, here, model_files, online, serving

TOKEN = "hf_" + "s3cretS3cret" * 3


def told(model: str, revision: str | None = None, token: str | None = None) -> str:
    """What is said of a model that is not to be had."""
    with pytest.raises(SpecDefError) as raised:
        resolve(model, revision=revision, token=token)
    assert TOKEN not in str(raised.value) + raised.value.hint
    return f"{raised.value.problem}\n{raised.value.hint}"


def found(model: str, revision: str | None = None) -> tuple[Path, str, str | None, str | None]:
    resolved = resolve(model, revision=revision)
    return resolved.directory, resolved.name, resolved.revision, resolved.commit


def base_at(ref: str) -> dict[str, str | None]:
    """What a manifest says of ``org/name`` as its base."""
    return {"name": "org/name", "revision": ref, "commit": COMMITS[ref], "hub_id": None, "subfolder": None}


def test_a_directory_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    for typed in (str(tmp_path / "model"), "model", "./model"):
        found = resolve(typed)
        assert found.directory.resolve() == tmp_path / "model"
        assert (found.name, found.revision, found.commit) == (typed, None, None)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/model").directory == tmp_path / "model"


@pytest.mark.parametrize(
    "typed", ["./nothing", "/no/such/place", "../x", "~/nothing", "a/b/c", "org/na me", "", "org/", "@main", "a\0b"]
)
def test_what_is_neither_a_directory_nor_a_hub_id(typed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    with refusal("neither a directory nor a Hub id"):
        resolve(typed)


@pytest.mark.parametrize(
    "typed", ["https://huggingface.co/org/name", "https://hf.co/org/name/tree/v1", "hf://org/name"]
)
def test_an_address_is_answered_with_the_hub_id_in_it(typed: str) -> None:
    with refusal("(Give org/name.)"):
        resolve(typed)


def test_a_hub_id_with_a_slash_at_its_end_is_told_without_it() -> None:
    assert "slash at its end: org/name." in told("org/name/")
    assert "slash" not in told("./org/name/")


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"README.md": b"x"}, ("org/name has no config.json", "a model that transformers can load")),
        (
            {"adapter_config.json": b'{"base_model_name_or_path": "org/base"}', "adapter_model.safetensors": b"x"},
            ("org/name has no config.json: it is an adapter of PEFT for org/base", "from_pretrained('org/name')"),
        ),
        ({"config.json": b"{}"}, ("org/name has no safetensors weights",)),
        ({"config.json": b"\xef\xbb\xbf{}"}, ("org/name/config.json is not valid JSON", "without a byte order mark")),
    ],
    ids=["card", "adapter", "config", "marked config"],
)
def test_a_repository_without_a_model_is_named(files: dict[str, bytes], words: tuple[str, ...], tmp_path: Path) -> None:
    with online(Hub(files), tmp_path):
        refused = call_cli("harden", "org/name", "--out", tmp_path / "out")
    assert_refused(refused, *words)
    assert "snapshots" not in refused.stderr


def test_a_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(SpecDefError, match="is a file"):
        resolve(str(tmp_path / "model.safetensors"))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model.Q4_K_M.gguf", ("llama.cpp", "gguf_file='model.Q4_K_M.gguf'")),
        ("pytorch_model.bin", ("pickled", "save_pretrained")),
        ("tf_model.h5", ("TensorFlow", "from_tf=True")),
    ],
)
@pytest.mark.parametrize("beside", [{}, {"README.md": b"x", "config.json": b"{}"}], ids=["alone", "with a config"])
def test_another_format_is_named(name: str, words: tuple[str, ...], beside: dict[str, bytes], tmp_path: Path) -> None:
    with online(Hub({name: b"x" * 9, **beside}), tmp_path) as hub, pytest.raises(SpecDefError) as raised:
        resolve("org/name")
    assert raised.value.problem.startswith("org/name has only ")
    for word in (*words, name, "'org/name'"):
        assert word in str(raised.value)
    assert hub.downloaded() == []
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(SpecDefError) as of_a_file:
        resolve(str(tmp_path / name))
    assert of_a_file.value.hint == raised.value.hint.replace("org/name", str(tmp_path))


def test_two_revisions_are_refused() -> None:
    with pytest.raises(SpecDefError, match="two revisions are named: v1 and v2"):
        resolve("org/name@v1", revision="v2")


def test_a_model_is_fetched_once_and_then_served_offline(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = {"pytorch_model.bin": b"a pickle", "model.onnx": b"x", "weights.pt": b"a pickle"}
    with online(Hub(model_files(llama) | others), tmp_path) as hub:
        resolve("org/name", token=TOKEN)
        assert not others.keys() & set(hub.downloaded())
        assert "model.safetensors" in hub.downloaded()
        assert any(authorization == f"Bearer {TOKEN}" for _, _, authorization in hub.seen)
        count = len(hub.downloaded())
        assert found("org/name")[2:] == ("main", COMMITS["main"])
        assert len(hub.downloaded()) == count
        assert found("org/name@v1")[2:] == ("v1", COMMITS["v1"])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    for model, revision, ref in (
        ("org/name", None, "main"),
        ("org/name@v1", None, "v1"),
        ("org/name", "v1", "v1"),
        ("org/name@v1", "v1", "v1"),
        ("org/name", COMMITS["v1"], COMMITS["v1"]),
    ):
        commit = COMMITS.get(ref, ref)
        directory = tmp_path / "cache/models--org--name/snapshots" / commit
        assert found(model, revision) == (directory, "org/name", ref, commit)
    said = told("org/other")
    assert "org/other" in said
    assert "HF_HUB_OFFLINE" in said


@pytest.mark.parametrize(
    ("hub", "words"),
    [
        (Hub({}, file_status=403, error_code="GatedRepo"), ("org/name is gated", "Ask for access", "HF_TOKEN")),
        (Hub({}, file_status=401, error_code="GatedRepo"), ("org/name is gated", "Ask for access", "HF_TOKEN")),
        (Hub({}, api_status=403, error_code="GatedRepo"), ("org/name is gated", "Ask for access", "HF_TOKEN")),
        (Hub({}, api_status=403), ("org/name is gated", "HF_TOKEN")),
        (Hub({}, api_status=401), ("org/name is neither", "spelling", "HF_TOKEN")),
        (Hub({}, api_status=404, error_code="RepoNotFound"), ("org/name is neither", "spelling", "HF_TOKEN")),
        (Hub({}, api_status=500), ("org/name could not be fetched", "500", "Try again")),
    ],
    ids=["files-403", "files-401", "api-403-gated", "api-403", "api-401", "api-404", "api-500"],
)
def test_what_the_hub_denies_is_told_in_two_lines(
    hub: Hub, words: tuple[str, ...], llama: Path, tmp_path: Path
) -> None:
    hub.files = model_files(llama)
    with online(hub, tmp_path):
        said = told("org/name", token=TOKEN)
    for word in words:
        assert word in said


def test_an_unknown_repository_and_an_unknown_revision(llama: Path, tmp_path: Path) -> None:
    with online(Hub(model_files(llama)), tmp_path):
        assert "org/misspelt" in told("org/misspelt")
        assert "org/name has no revision v9" in told("org/name@v9")


def test_no_server_at_all(tmp_path: Path) -> None:
    with serving(Hub({})) as hub:
        pass  # so that nobody listens there any more
    with here(hub, tmp_path):
        assert "org/name is not in the local cache and the Hub cannot be reached" in told("org/name")
