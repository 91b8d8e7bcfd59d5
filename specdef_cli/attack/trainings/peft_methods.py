"""Adapters of PEFT, a row each: everything that it has, that goes on any linear and that trains an ordinary model.

Left out, and why: AdaLoRA and Shadow (their loss is not the language model's alone), VB-LoRA and UniLoRA (they start at
another function than the model's), CPT (its loss was not a number), Poly and multitask prompt tuning (they need tasks),
X-LoRA (a mixture of adapters that are trained already), Adaption Prompt (it needs to be told where, for each family),
Trainable Tokens (embeddings, of tokens that are named). The rest of PEFT's has not been tried in earnest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from specdef_cli.attack.table import Factor


@dataclass(frozen=True)
class PeftMethod:
    """One kind of adapter."""

    name: str
    label: str
    paper: str
    config: str
    size: Factor | None = None  # the number it takes
    size_argument: str = "r"  # what config calls that number
    arguments: Mapping[str, Any] = field(default_factory=dict)  # what else config is made with
    on: Literal["linears", "norms", "prompt"] = "linears"
    """On which modules it goes by default; ``prompt``: on none, and in front of the sequence."""


_RANK = Factor("rank", 16)
_TOKENS = Factor("number of tokens", 16)

PEFT_METHODS: tuple[PeftMethod, ...] = (
    PeftMethod("hira", "HiRA", "Huang et al. 2025", "HiraConfig", _RANK),
    PeftMethod("loha", "LoHa", "arXiv 2108.06098", "LoHaConfig", _RANK),
    PeftMethod("lokr", "LoKr", "arXiv 2309.14859", "LoKrConfig", _RANK),
    PeftMethod("oft", "OFT", "arXiv 2306.07280", "OFTConfig", Factor("block size", 16), "oft_block_size"),
    PeftMethod("boft", "BOFT", "arXiv 2311.06243", "BOFTConfig", Factor("block size", 4), "boft_block_size"),
    PeftMethod("hra", "HRA", "arXiv 2405.17484", "HRAConfig", Factor("number of reflections", 8)),
    PeftMethod("vera", "VeRA", "arXiv 2310.11454", "VeraConfig", Factor("rank", 256)),
    PeftMethod("randlora", "RandLoRA", "arXiv 2502.00987", "RandLoraConfig", _RANK),
    PeftMethod("delora", "DeLoRA", "arXiv 2503.18225", "DeloraConfig", _RANK),
    PeftMethod("gralora", "GraLoRA", "arXiv 2505.20355", "GraloraConfig", _RANK),
    PeftMethod("miss", "MiSS", "arXiv 2409.15371", "MissConfig", _RANK),
    PeftMethod("c3a", "C³A", "arXiv 2407.19342", "C3AConfig", Factor("block size", 16), "block_size",
               {"init_weights": True}),
    PeftMethod("fourierft", "FourierFT", "arXiv 2405.03003", "FourierFTConfig", Factor("number of frequencies", 256),
               "n_frequency", {"init_weights": True}),
    PeftMethod("waveft", "WaveFT", "arXiv 2505.12532", "WaveFTConfig", Factor("number of frequencies", 256),
               "n_frequency"),
    PeftMethod("road", "RoAd", "arXiv 2409.00119", "RoadConfig", Factor("group size", 16), "group_size"),
    PeftMethod("shira", "SHiRA", "arXiv 2406.13175", "ShiraConfig", Factor("rank", 4)),
    PeftMethod("psoft", "PSOFT", "arXiv 2505.11235", "PsoftConfig", _RANK),
    PeftMethod("ln-tuning", "LN tuning", "arXiv 2312.11420", "LNTuningConfig", on="norms"),
    PeftMethod("prefix", "prefix tuning", "arXiv 2101.00190", "PrefixTuningConfig", _TOKENS, "num_virtual_tokens",
               on="prompt"),
    PeftMethod("p-tuning", "P-tuning", "arXiv 2103.10385", "PromptEncoderConfig", _TOKENS, "num_virtual_tokens",
               on="prompt"),
    PeftMethod("prompt", "prompt tuning", "arXiv 2104.08691", "PromptTuningConfig", _TOKENS, "num_virtual_tokens",
               on="prompt"),
)  # fmt: skip
