"""The table of formats: a row is one thing that others do to a published checkpoint, and the tool they do it with."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from specdef_cli.certify.deployment import consumers, quantizers
from specdef_cli.certify.deployment.adapters import attach_adapter
from specdef_cli.certify.deployment.consumers import Score
from specdef_cli.certify.deployment.engines import bitsandbytes_4bit, bitsandbytes_8bit, torchao
from specdef_cli.certify.deployment.llamacpp import Settings, gguf_loss
from specdef_cli.certify.deployment.stand_ins import quantize_gguf, quantized, scaled_float8, to_bfloat16, to_float16
from specdef_cli.certify.deployment.subject import Change, Subject, unchanged
from specdef_cli.certify.deployment.trial import NotApplicableError, Trial


@dataclass(frozen=True)
class Format:
    """One thing that others do to a checkpoint.

    A row either says how a model of transformers is loaded and changed, and is then measured by a forward pass; or it
    has ``score``, a function of its own.

    Attributes:
        description: A few words for a table, without the tool's name.
        tool: Who does it: a key of :data:`~specdef_cli.certify.deployment.tools.PACKAGES` or ``PROGRAMS``; any other
            name stands for an engine that is never run from here.
        dtype: What to load the weights as; ``None`` for the dtype that they are stored in.
        loading: More arguments of ``from_pretrained``.
        change: What is done to the loaded model.
        round_states: What a key/value cache rounds to; ``None`` for the forward pass without a cache.
        reference: What is done to the float32 base for the outputs that relative errors are measured against.
        score: Measures the trial itself.
        stand_in: What is measured where the tool is not installed; its figures are called simulated.
        by_default: Whether ``specdef certify`` tries it unasked.
    """

    description: str
    tool: str = "transformers"
    dtype: torch.dtype | None = torch.float32
    loading: Callable[[], dict[str, Any]] = dict
    change: Change = unchanged
    round_states: Callable[[Tensor], Tensor] | None = None
    reference: Change = unchanged
    score: Callable[[Trial], Score] | None = None
    stand_in: Format | None = field(default=None, repr=False)
    by_default: bool = True


def adapt(subject: Subject, *, carried: bool, merged: bool) -> Subject:
    """Put an adapter on (:func:`attach_adapter`), and merge it into the weights as they are stored, or not."""
    adapted: Any = attach_adapter(subject.model, subject.directory, carried=carried)
    return replace(subject, model=adapted.merge_and_unload() if merged else adapted)


def compile_model(subject: Subject) -> Subject:
    """``torch.compile`` with its default backend.

    Raises:
        NotApplicableError: There is no C++ compiler.
    """
    if subject.model.device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++"))):
        raise NotApplicableError("torch.compile needs a C++ compiler, and there is none")
    return replace(subject, model=torch.compile(subject.model))


def _rounded(weights: quantizers.Quantizer, inputs: quantizers.Quantizer | None = None) -> Format:
    return Format("", change=quantized(weights, inputs))


def _bitsandbytes(description: str, loading: Callable[[], dict[str, Any]], stand_in: Format | None) -> Format:
    return Format(description, "bitsandbytes", None, loading, stand_in=stand_in)


def _torchao(
    description: str, stand_in: Format | None, name: str, *, by_default: bool = True, **options: Any
) -> Format:
    return Format(description, "torchao", change=torchao(name, **options), stand_in=stand_in, by_default=by_default)


CONVERTED = ("F16", "Q8_0")
"""Types that llama.cpp's converter writes itself, and its quantizer too."""


def _llama_cpp(settings: Settings, words: str, stand_in: Format | None = None) -> Format:
    def score(trial: Trial) -> Score:
        return Score(gguf_loss(trial, settings))

    return Format(f"{settings.kind}{words}", "llama.cpp", score=score, stand_in=stand_in, by_default=not words)


def _llama_cpp_rows() -> dict[str, Format]:
    """Every type with llama.cpp's defaults, then without flash attention, and with a float32 cache."""
    types: dict[str, quantizers.GgufType] = {"Q8_0": "Q8_0", "Q4_0": "Q4_0", "Q4_K_M": "Q4_K"}
    inputs = {"F32": None, "BF16": to_bfloat16, "F16": to_float16}
    stand_ins = {
        kind: Format("", change=quantized(round_ or _as_it_is, round_), round_states=to_float16)
        for kind, round_ in inputs.items()
    }
    stand_ins |= {
        name: Format("", change=partial(quantize_gguf, kind=kind), round_states=to_float16)
        for name, kind in types.items()
    }
    rows = {}
    for kind, stand_in in stand_ins.items():
        name = kind.lower() if kind.startswith("Q") else f"gguf-{kind.lower()}"
        rows[name] = _llama_cpp(Settings(kind), "", stand_in)
        rows[f"{name}/no-flash"] = _llama_cpp(Settings(kind, "f16", False), ", no flash attention")
        rows[f"{name}/f32-cache"] = _llama_cpp(Settings(kind, "f32", True), ", float32 cache")
        rows[f"{name}/f32-cache/no-flash"] = _llama_cpp(
            Settings(kind, "f32", False), ", float32 cache, no flash attention"
        )
        if kind in CONVERTED:
            rows[f"{name}/converter"] = _llama_cpp(Settings(kind, by_converter=True), ", written by the converter")
    return rows


def _as_it_is(weight: Tensor) -> Tensor:
    return weight


_attached, _merged = partial(adapt, carried=True, merged=False), partial(adapt, carried=True, merged=True)
_transplanted = partial(adapt, carried=False, merged=True)
_float8_tensor, _float8_row = (partial(quantizers.float8, per_row=rows) for rows in (False, True))

FORMATS: Mapping[str, Format] = {
    "float32": Format("float32"),
    "bfloat16": Format("bfloat16", dtype=torch.bfloat16),
    "float16": Format("float16", dtype=torch.float16),
    "static-cache": Format("static cache", score=consumers.static_cache, by_default=False),
    "long-input": Format("long input", score=consumers.long_input, by_default=False),
    "left-padded": Format("left-padded batch", score=consumers.left_padded, by_default=False),
    "compile": Format("torch.compile", dtype=None, change=compile_model, by_default=False),
    "llm-int8": _bitsandbytes(
        "LLM.int8", bitsandbytes_8bit, _rounded(quantizers.int8_rows, quantizers.llm_int8_activations)
    ),
    "nf4": _bitsandbytes("NF4", partial(bitsandbytes_4bit, "nf4"), _rounded(partial(quantizers.four_bit, kind="nf4"))),
    "fp4": _bitsandbytes("FP4", partial(bitsandbytes_4bit, "fp4"), _rounded(partial(quantizers.four_bit, kind="fp4"))),
    "nf4-double": _bitsandbytes("NF4, double quantization", partial(bitsandbytes_4bit, "nf4", True), None),
    "torchao-float8": _torchao("float8 weights, a scale a row", _rounded(_float8_row), "Float8WeightOnlyConfig"),
    "torchao-int8": _torchao("int8 weights", _rounded(quantizers.int8_rows), "Int8WeightOnlyConfig"),
    "torchao-int4": _torchao(
        "int4 weights, groups of 64", None, "IntxWeightOnlyConfig", weight_dtype="int4", granularity=("PerGroup", 64)
    ),
    "torchao-int4-packed": _torchao(
        "int4 weights, groups of 64, packed for a GPU", None, "Int4WeightOnlyConfig", by_default=False, group_size=64
    ),
    "float8-row": Format(
        "float8, weights and activations, a scale a row", "vLLM", stand_in=_rounded(_float8_row, _float8_row)
    ),
    "float8-tensor": Format(
        "float8, weights and activations, a scale a tensor", "vLLM", stand_in=_rounded(_float8_tensor, _float8_tensor)
    ),
    "kv-float8": Format(
        "key/value cache float8, unscaled", "vLLM", stand_in=Format("", round_states=quantizers.to_float8)
    ),
    "kv-float8-scaled": Format(
        "key/value cache float8, a scale a tensor", "vLLM", stand_in=Format("", round_states=scaled_float8)
    ),
    **_llama_cpp_rows(),
    "lora": Format("LoRA carried over, attached", "PEFT", None, change=_attached, reference=_attached),
    "lora-merged": Format("LoRA carried over, merged", "PEFT", None, change=_merged, reference=_attached),
    "lora-of-base": Format(
        "LoRA of the base unchanged, merged", "PEFT", None, change=_transplanted, reference=_attached
    ),
    "lora-round-trip": Format(
        "LoRA attached, trained, merged, reloaded", "PEFT", score=consumers.lora_round_trip, by_default=False
    ),
    "sft": Format("SFTTrainer with its defaults, after 5 steps", "TRL", score=consumers.fine_tuned, by_default=False),
    "lm-eval": Format("a local task", "lm-eval", score=consumers.harness, by_default=False),
    "merge": Format("linear merge with the base", "mergekit", score=consumers.merged_with_base, by_default=False),
    "embeddings": Format("embeddings", "sentence-transformers", score=consumers.sentence_embeddings, by_default=False),
}  # fmt: skip
"""Every format by its name."""

DEFAULT_FORMATS = tuple(name for name, row in FORMATS.items() if row.by_default)
"""Those that take seconds for a small model."""
