"""The tools that formats are measured with: bitsandbytes, torchao, llama.cpp; and which of them are installed here.

llama.cpp's runtime and quantizer are those of ``llama-cpp-python``; its converter comes with llama.cpp's sources only.
Each runs in a process of its own, because a failed assertion in llama.cpp ends the process.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from specdef_cli.model.opened import OpenedModel

WORKER: tuple[Path | str, ...] = (sys.executable, "-P", Path(__file__).with_name("llamacpp_worker.py"))
"""-P: this directory's modules are not for the worker to import."""

LLAMA_CPP = "LLAMA_CPP"
"""Environment variable: a directory with llama.cpp's sources, for its converter; else the converter is on the path."""

CONVERTER = "convert_hf_to_gguf.py"

PACKAGES = {
    "transformers": ("transformers", "transformers"),
    "bitsandbytes": ("bitsandbytes", "'specdef-cli[deploy]'"),
    "torchao": ("torchao", "'specdef-cli[deploy]'"),
    "llama.cpp": ("llama_cpp", "llama-cpp-python"),
}
"""By the tool's name: the package to import, and what pip installs it from."""

PROGRAMS = {"llama.cpp": (CONVERTER, f"set {LLAMA_CPP} to the directory of llama.cpp's sources")}
"""By the tool's name: the program that is needed, and what to do without it."""


def missing(tool: str) -> str:
    """Say why a tool cannot be used, and what to do; empty if it can."""
    if tool in PACKAGES:
        package, source = PACKAGES[tool]
        # A package that is None in sys.modules is blocked, and find_spec would raise.
        if sys.modules.get(package, package) is None or importlib.util.find_spec(package) is None:
            return f"not installed: pip install {source}"
    if tool in PROGRAMS:
        name, remedy = PROGRAMS[tool]
        if program(name) is None:
            return f"no {name} found: {remedy}"
    return ""


def program(name: str) -> Path | None:
    """Find a program in llama.cpp's named directory, beside the interpreter, or on the path."""
    named = os.environ.get(LLAMA_CPP)
    # A virtual environment that is not activated is not on the path.
    for place in ([Path(named)] if named else []) + [Path(sys.executable).parent]:
        if (place / name).is_file():
            return place / name
    found = shutil.which(name)
    return None if found is None else Path(found)


def bitsandbytes_8bit() -> dict[str, Any]:
    """Arguments of ``from_pretrained`` for LLM.int8: weights and activations in 8 bits, outliers in float16."""
    from transformers import BitsAndBytesConfig

    return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}


def bitsandbytes_4bit(kind: str, *, double: bool = False) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` for 4-bit weights (``nf4`` or ``fp4``) in blocks of 64."""
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double)
    return {"quantization_config": config}


def torchao(name: str, **options: Any) -> Callable[[Any, Trial], Any]:
    """A change of a model: torchao's ``quantize_`` with its defaults, heads included.

    Args:
        name: A configuration of ``torchao.quantization``.
        options: Its arguments. ``granularity`` is a class's name and its arguments, ``weight_dtype`` a dtype's name.
    """

    def quantize(model: Any, _: Trial) -> Any:
        library: Any = importlib.import_module("torchao.quantization")
        given = dict(options)
        if "granularity" in given:
            kind, *arguments = given["granularity"]
            given["granularity"] = getattr(library, kind)(*arguments)
        if "weight_dtype" in given:
            given["weight_dtype"] = getattr(torch, given["weight_dtype"])
        with torch.no_grad():
            library.quantize_(model, getattr(library, name)(**given))
        return model

    return quantize


def gguf_loss(
    trial: Trial, kind: str, cache: str = "f16", *, flash_attention: bool = True, by_converter: bool = False
) -> float:
    """The loss of a checkpoint in llama.cpp, in nats a token; may be not finite.

    Args:
        kind: A type of ``llama-quantize``: F32, F16, BF16, Q8_0, Q4_0, Q4_K_M …
        cache: The key/value cache's type; float16 is llama.cpp's default.
        by_converter: Whether the converter writes that type itself, which checks no value; else the quantizer does,
            which stops where a block is not finite.
    """
    tokens = trial.scratch / "tokens.npy"
    np.save(tokens, trial.required_tokens().numpy(force=True).astype(np.int32))
    path = gguf_file(trial, kind, by_converter=by_converter)
    flash = "on" if flash_attention else "off"
    output = _run("llama.cpp", [*WORKER, "loss", path, tokens, cache, flash])
    return float(json.loads(output.splitlines()[-1])["loss"])


def gguf_file(trial: Trial, kind: str, *, by_converter: bool = False) -> Path:
    """The checkpoint as a GGUF file of a type, made where it is not there yet.

    The converter writes F32, and what it is told to; else its F32 file is quantized.
    """
    path = trial.scratch / f"{kind}{'-converted' if by_converter else ''}.gguf"
    if path.is_file():
        return path
    refused, unfinished = path.with_suffix(".refused"), path.with_suffix(".part")
    if refused.is_file():  # the float32 file is asked for by most rows
        raise RefusedError(refused.read_text(encoding="utf-8"))
    try:
        if by_converter or kind == "F32":
            converter = program(CONVERTER)
            assert converter is not None, "the converter is missing, which was asked before"
            made: list[Path | str] = ["--outtype", kind.lower(), "--outfile", unfinished]
            _run("llama.cpp's converter", [sys.executable, converter, trial.directory.resolve(), *made])
        else:
            _run("llama.cpp's quantizer", [*WORKER, "quantize", gguf_file(trial, "F32"), unfinished, kind])
    except RefusedError as error:
        refused.write_text(str(error), encoding="utf-8")
        raise
    unfinished.rename(path)
    return path


def _run(what: str, command: Sequence[Path | str]) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        how = f"crashed (signal {-done.returncode}): " if done.returncode < 0 else ""
        raise RefusedError(f"{what}: {how}{lines[-1] if lines else f'exit status {done.returncode}'}")
    return done.stdout


MAX_LOGITS = 2**24
"""Logits of one forward pass: 128 MB in float64, in which their loss is taken."""


class NotApplicableError(Exception):
    """A format does not apply to this model, or is not available here; the message says why."""


class RefusedError(Exception):
    """A tool refuses the checkpoint; the message is its own, in one line."""


@dataclass(frozen=True)
class Trial:
    """A checkpoint and what it is measured by.

    Attributes:
        scratch: A directory for a tool's own files (a GGUF file, an adapter); what is there already is used again, so
            it belongs to this checkpoint and these tokens alone.
        tokens: int64, shape [sequences, length]; ``None`` for what is no language model.
    """

    model: OpenedModel
    base: OpenedModel
    scratch: Path
    tokens: Tensor | None = None
    device: str | None = None

    @property
    def directory(self) -> Path:
        """Where the model's files are, for tools that take a path."""
        return self.model.directory

    def loaded(self, dtype: torch.dtype | None = None, **loading: Any) -> AbstractContextManager[Any]:
        """Load the model for the block, in ``dtype`` or as it is stored."""
        return self.model.loaded(dtype=dtype, device=self.device, **loading)

    def required_tokens(self) -> Tensor:
        """The tokens; raises :class:`NotApplicableError` where there are none."""
        if self.tokens is None:
            raise NotApplicableError("only causal language models are measured")
        return self.tokens


def mean_loss(model: Any, tokens: Tensor) -> float:
    """Mean next-token cross-entropy in nats of plain forward passes; may be not finite.

    Args:
        model: Takes ``input_ids`` and returns ``logits``.
        tokens: int64, shape [sequences, length].
    """
    with torch.inference_mode():
        return mean_over_batches(
            tokens, model.config, lambda batch: model(input_ids=batch.to(next(model.parameters()).device)).logits
        )


def mean_over_batches(tokens: Tensor, config: Any, logits: Callable[[Tensor], Tensor]) -> float:
    """Mean next-token cross-entropy in nats over sequences of one length.

    Args:
        tokens: int64, shape [sequences, length].
        logits: From tokens [batch, length] to [batch, length, vocabulary].
    """
    # The logits of a large vocabulary take more memory than the text; a small model spends its time on calls.
    size = max(1, MAX_LOGITS // (tokens.shape[1] * config.get_text_config().vocab_size))
    losses = [len(batch) * next_token_loss(logits(batch), batch) for batch in tokens.split(size)]
    return math.fsum(losses) / len(tokens)


def next_token_loss(logits: Tensor, tokens: Tensor) -> float:
    """Mean next-token cross-entropy in nats; ``logits`` [batch, length, vocabulary], ``tokens`` [batch, length]."""
    predictions, targets = logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
    return float(torch.nn.functional.cross_entropy(predictions.double().cpu(), targets.cpu()))
