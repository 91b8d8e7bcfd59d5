"""llama.cpp: its converter, its quantizer, and its runtime on the same tokens as every other tool.

The runtime and the quantizer are those of ``llama-cpp-python``; the converter comes with llama.cpp's sources only. Each
runs in a process of its own, because a failed assertion in llama.cpp ends the process.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from specdef_cli.certify.deployment.tools import CONVERTER, program
from specdef_cli.certify.deployment.trial import RefusedError, Trial

WORKER = Path(__file__).with_name("llamacpp_worker.py")


@dataclass(frozen=True)
class Settings:
    """How llama.cpp runs a file.

    Attributes:
        kind: A type of ``llama-quantize``: F32, F16, BF16, Q8_0, Q4_0, Q4_K_M …
        cache: The key/value cache's type; float16 is llama.cpp's default.
        flash_attention: Whether it is on; llama.cpp's default takes it where it can, and on CPUs it can.
        by_converter: Whether the converter writes that type itself, which checks no value; else the quantizer does,
            which stops where a block is not finite.
    """

    kind: str
    cache: str = "f16"
    flash_attention: bool = True
    by_converter: bool = False


def gguf_loss(trial: Trial, settings: Settings) -> float:
    """The loss of a checkpoint in llama.cpp, in nats a token; may be not finite.

    Raises:
        NotApplicableError: The trial has no tokens.
        RefusedError: The converter, the quantizer or the runtime ends with an error, or crashes.
    """
    tokens = trial.scratch / "tokens.npy"
    np.save(tokens, trial.required_tokens().numpy(force=True).astype(np.int32))
    path = gguf_file(trial, settings.kind, by_converter=settings.by_converter)
    flash_attention = "on" if settings.flash_attention else "off"
    output = _run("llama.cpp", [*_worker(), "loss", path, tokens, settings.cache, flash_attention])
    return float(json.loads(output.splitlines()[-1])["loss"])


def gguf_file(trial: Trial, kind: str, *, by_converter: bool = False) -> Path:
    """The checkpoint as a GGUF file of a type, made where it is not there yet.

    Args:
        trial: The checkpoint.
        kind: The type. F32 is always the converter's.
        by_converter: Whether the converter writes it; else its float32 file is quantized.

    Raises:
        RefusedError: The converter or the quantizer ends with an error.
    """
    path = trial.scratch / f"{kind}{'-converted' if by_converter else ''}.gguf"
    if path.is_file():
        return path
    refused, unfinished = path.with_suffix(".refused"), path.with_suffix(".part")
    if refused.is_file():  # the float32 file is asked for by most rows
        raise RefusedError(refused.read_text(encoding="utf-8"))
    try:
        _write(trial, kind, unfinished, by_converter)
    except RefusedError as error:
        refused.write_text(str(error), encoding="utf-8")
        raise
    unfinished.rename(path)
    return path


def _write(trial: Trial, kind: str, out: Path, by_converter: bool) -> None:
    if by_converter or kind == "F32":
        converter = program(CONVERTER)
        assert converter is not None, "the converter is missing, which was asked before"
        command: list[Path | str] = [
            sys.executable,
            converter,
            trial.directory.resolve(),
            "--outtype",
            kind.lower(),
            "--outfile",
            out,
        ]
        _run("llama.cpp's converter", command)
    else:
        _run("llama.cpp's quantizer", [*_worker(), "quantize", gguf_file(trial, "F32"), out, kind])


def _worker() -> list[Path | str]:
    return [sys.executable, "-P", WORKER]  # -P: this directory's modules are not for the worker to import


def _run(what: str, command: list[Path | str]) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        how = f"crashed (signal {-done.returncode}): " if done.returncode < 0 else ""
        raise RefusedError(f"{what}: {how}{lines[-1] if lines else f'exit status {done.returncode}'}")
    return done.stdout
