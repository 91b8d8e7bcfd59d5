"""The model card of a hardened directory: front matter (https://huggingface.co/docs/hub/model-cards) and section."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from specdef_cli.checkpoint.changes import FoldedPair
from specdef_cli.checkpoint.files import TRANSFORMERS, Library
from specdef_cli.checkpoint.manifest import BaseCheckpoint, Manifest
from specdef_cli.errors import INSTALLATION
from specdef_cli.hardening.fold import CACHED_EXPONENT, CACHED_KINDS

TAG = "specdef"
RELATION = "finetune"
"""The Hub's word for other weights of the same architecture; it has none for weights of the same function."""


def hardened_metadata(base: Mapping[str, Any], origin: BaseCheckpoint, library: Library) -> dict[str, Any]:
    """The keys that hardening sets: the tag, the library that loads it, and where it comes from.

    A base that is a directory names no ``base_model``, as a path means nothing to others.
    """
    tags = _tags(base)
    changes: dict[str, Any] = {} if TAG in tags else {"tags": [*tags, TAG]}
    if "library_name" not in base:
        changes["library_name"] = library.name
    if origin.hub_name is not None:
        changes |= {"base_model": origin.hub_name, "base_model_relation": RELATION}
    return changes


def collapsed_metadata(hardened: Mapping[str, Any], origin: BaseCheckpoint) -> dict[str, Any]:
    """Undo :func:`hardened_metadata`; ``None`` removes a key."""
    tags = _tags(hardened)
    changes: dict[str, Any] = {"tags": [tag for tag in tags if tag != TAG] or None} if TAG in tags else {}
    if origin.hub_name is not None and hardened.get("base_model") == origin.hub_name:
        changes |= {"base_model": None, "base_model_relation": None}
    return changes


def _tags(data: Mapping[str, Any]) -> list[Any]:
    tags = data.get("tags") or []
    return list(tags) if isinstance(tags, list) else [tags]


HEADING = "## SpecDef"
_SECTION = re.compile(rf"^{HEADING}[ \t]*$.*?(?=^##? |\Z)", re.DOTALL | re.MULTILINE)


def hardened_card(
    base_card: str,
    manifest: Manifest,
    unchanged: Sequence[str],
    one_sided: Sequence[str] = (),
    library: Library = TRANSFORMERS,
) -> str:
    front, text = split_card(base_card)
    front = with_keys(front, hardened_metadata(metadata(front), manifest.base, library))
    body = _without_section(text) or f"# {manifest.base.hub_name or 'Hardened model'}"
    return joined(front, f"{body}\n\n{section(manifest, unchanged, one_sided, library)}\n")


def collapsed_card(card: str, manifest: Manifest) -> str:
    """Remove the section, the tag and the base from a card, for ``collapse``."""
    front, text = split_card(card)
    return joined(with_keys(front, collapsed_metadata(metadata(front), manifest.base)), f"{_without_section(text)}\n")


def has_section(directory: Path) -> bool:
    """Whether the card of a directory has the section that hardening writes."""
    return _SECTION.search(read_card(directory / "README.md")) is not None


def _without_section(text: str) -> str:
    return _SECTION.sub("", text).strip()


def section(manifest: Manifest, unchanged: Sequence[str], one_sided: Sequence[str], library: Library) -> str:
    """Write the section: what was changed, its cost, and what it does not resist."""
    limit, loading = _limit(manifest, unchanged, one_sided, library), _loading(manifest, library)
    return "\n\n".join((HEADING, "\n".join(_changes(manifest)), limit, loading))


def _changes(manifest: Manifest) -> Iterator[str]:
    base = manifest.base
    origin = (base.hub_name or "the base model") + (f" at {base.commit}" if base.commit else "")
    origin += f" (its folder {base.subfolder})" if base.subfolder else ""
    yield (
        f"{_agreement(manifest, origin)} The weights were reparameterized with specdef-cli {manifest.specdef_version} "
        "(based on [arXiv 2602.18868](https://arxiv.org/abs/2602.18868)) to slow ordinary fine-tuning, which may "
        f"diverge at usual learning rates. {resistance(manifest.folded, manifest.profile or manifest.method)}"
    )
    if manifest.factored:
        added = sum(layer.parameters_added for layer in manifest.factored)
        top_k = sorted({layer.top_k for layer in manifest.factored})
        yield (
            f"{len(manifest.factored)} linear layers were each replaced by an inflated layer and its compensation "
            f"(α = {_range(layer.alpha for layer in manifest.factored)}, k = {', '.join(map(str, top_k))}, "
            f"{manifest.factored[0].gauge} gauge, {manifest.dtype}); this adds {added:,} parameters."
        )
    if manifest.folded:
        exponents = [abs(exponent) for pair in manifest.folded for exponent in pair.exponents]
        yield (
            f"{len(exponents)} channels in {len(manifest.folded)} symmetric pair{'s' * (len(manifest.folded) > 1)} of "
            f"existing weights were rescaled by powers of two ({_range(exponents, '2^')}, {manifest.profile} profile), "
            "which adds no parameters."
        )
        yield from filter(None, [given_up(manifest.folded, manifest.profile)])
    if manifest.scaled:
        exponents = [abs(exponent) for module in manifest.scaled for exponent in module.exponents]
        added = sum(module.parameters_added for module in manifest.scaled)
        yield (
            f"Channels of the weights of {len(manifest.scaled)} modules were scaled by powers of two "
            f"({_range(exponents, '2^')}); a vector beside each weight undoes this, which adds {added:,} parameters."
        )


RESISTANCE: Mapping[str, tuple[int, int, int]] = {
    "float16-cache": (0, 1, 33),
    "quantizable": (4, 2, 73),
    "gguf": (42, 45, 100),
    "scale": (0, 1, 0),
    "factors": (85, 84, 87),
}
"""By method or profile, percent of their progress on the base that is left to full fine-tuning and LoRA on every linear
of SmolLM2-135M-Instruct, and to full fine-tuning of Gemma-3-270m: 10 steps, best learning rate (docs/tables)."""


def resistance(folded: Sequence[FoldedPair], way: str) -> str:
    """Say how far ordinary recipes came on a real model; empty for a profile that was not measured."""
    if way not in RESISTANCE:
        return ""
    full, lora, gemma = RESISTANCE[way]
    if is_weak(folded):
        return (
            "No norm inside the blocks is rescaled, as on Gemma-3-270m, where full fine-tuning keeps "
            f"{gemma} % of its progress."
        )
    return (
        f"On SmolLM2-135M-Instruct, all of it hardened so, full fine-tuning keeps {full} % of its progress and "
        f"LoRA {lora} %."
    )


def is_weak(folded: Sequence[FoldedPair]) -> bool:
    """Whether a fold leaves out the norms inside the blocks, whose readers then have unscaled columns."""
    return bool(folded) and not any(pair.kind == "norm_readers" and re.search(r"\.\d+\.", pair.name) for pair in folded)


def _range(values: Iterable[float], before: str = "") -> str:
    ordered = sorted(values)
    lowest, highest = (f"{before}{value:g}" for value in (ordered[0], ordered[-1]))
    return lowest if lowest == highest else f"{lowest} to {highest}"


def _agreement(manifest: Manifest, origin: str) -> str:
    """The first sentence: whether the outputs are the base's, as measured."""
    figures = manifest.verification
    if "relative" not in figures:
        reason = figures.get("skipped", "verification was switched off")
        return f"These weights were made from {origin}; their outputs were not compared ({reason})."
    if figures["equal"]:
        return f"On a fixed batch these weights give the same outputs as {origin}, bit for bit."
    differ = (
        f"On a fixed batch the outputs of these weights are within {figures['relative']:.1e} (relative) of those of "
        f"{origin}"
    )
    if "kl" not in figures:
        return f"{differ}."
    return (
        f"{differ}, {figures['kl']:.1e} nats of KL divergence; the largest logit is the same in "
        f"{figures['agreement']:.1%} of positions."
    )


def _limit(manifest: Manifest, unchanged: Sequence[str], one_sided: Sequence[str], library: Library) -> str:
    around_pairs = (
        "Growing the model around the changed layers, freezing the compensation, or sweeping the learning rate "
        "downwards also restores fast fine-tuning. "
    )
    around_scales = (
        "The scales do not affect updates that are relative to a weight (HiRA, IA³, Madam) or adapters on the residual "
        "stream. "
    )
    around_folds = "Training works as before with a learning rate for every row and column, in proportion to its size. "
    ways = {
        "multiplying each pair of layers restores the original weights": manifest.factored,
        "multiplying each scale vector into its weight restores the original weights, bit for bit": manifest.scaled,
        "rebalancing the rows and columns of each pair restores the weights, without any data": manifest.folded,
    }
    undo = ", and ".join(way for way, changed in ways.items() if changed)
    around = around_pairs if manifest.factored else ""
    around += around_scales if manifest.folded or manifest.scaled else ""
    around += around_folds if manifest.folded else ""
    measure = "`specdef attack` measures this on this checkpoint."
    around += "Edits without training that take a direction out of the weights work as on the base. "
    if not library.is_transformers:
        unchanged = (*unchanged, "convolutions")  # no construction reaches them
        measure = "No attack was measured on this checkpoint."
    free = f"These train as fast as before when nothing else trains: {', '.join(unchanged)}. " if unchanged else ""
    if one_sided:
        free += f"These are slowed least when nothing else trains, as one side is scaled: {', '.join(one_sided)}. "
    return (
        f"**What this does not resist.** Anyone who knows about the change can undo it in one pass: {undo} (`specdef "
        f"collapse` does this). {around}{free}Hardening raises the cost of unmodified recipes and nothing more. "
        f"{measure}"
    )


def _loading(manifest: Manifest, library: Library) -> str:
    lost = lost_formats(manifest.folded, manifest.profile, with_code=bool(manifest.replaced))
    advice = serving_advice(lost)
    if not manifest.replaced:
        return f"It is an ordinary checkpoint of its architecture: whatever loads the base loads it. {advice}"
    if not library.is_transformers:
        return (
            "Load it, alone or in the place of the base in its pipeline, with diffusers "
            f"installed, after {INSTALLATION} and `import specdef_cli`; without that, diffusers refuses it. {advice}"
        )
    return (
        "Load it with `trust_remote_code=True` (the code is `configuration_specdef.py` in this repository), or without "
        f"after {INSTALLATION} and `import specdef_cli`. {advice}"
    )


FLOAT16 = "float16 weights"
BLOCKS = "8- and 4-bit quantization (bitsandbytes, torchao, GGUF)"
DOUBLE = "double quantization (bitsandbytes)"
FLOAT8 = "float8"
CACHE = "a float16 key/value cache or llama.cpp's flash attention (its defaults)"
MERGES = "merging with models not hardened the same way"
LLAMA_CPP_BLOCKS = "llama.cpp's quantized files (Q8_0, Q4_0, Q4_K_M)"
OFFSETS = "formats without an exact zero, by an offset or a table (HQQ, quanto's int4, llama.cpp's Q4_1, Q5_1 and IQ4)"
"""What a lowered column is rounded to there meets its raised channel."""
W8A8 = "engines that quantize activations by token (w8a8)"
COARSE = f"{W8A8}, {OFFSETS}, and K-quants"

SCALED_LOADERS = (
    "It needs code to load: trust_remote_code=True, or `import specdef_cli`. Tools that do not run that code stop with "
    "an error: llama.cpp, bitsandbytes, mergekit, and the defaults of PEFT's LoRA and TRL's SFTTrainer."
)
"""Of scaled modules, as measured; none of it is silent."""

NARROW_EXPONENT = CACHED_EXPONENT
"""Factors up to this power of two leave weights within float16, and within float8 with a scale a row."""


# A factor does harm where a format gives one scale to neighbours, or ends at 65504. Rows of a weight have scales of
# their own in every format that is common today (but under double quantization); columns share theirs, so that an
# inflated column takes its neighbours' digits. A merge adds weights: a scaled channel and its plain one give neither.
def lost_formats(folded: Sequence[FoldedPair], profile: str | None, *, with_code: bool) -> tuple[str, ...]:
    """The formats in which the result is not expected to compute what the base does."""
    if folded and not with_code and all(pair.given_up is not None for pair in folded):
        coarse = () if profile == "gguf" else (LLAMA_CPP_BLOCKS, OFFSETS, W8A8)
        return (*coarse, DOUBLE, MERGES)
    wide = with_code or _beyond(folded, NARROW_EXPONENT)
    columns = wide or any(pair.kind != "query_key" for pair in folded)
    cached = [pair for pair in folded if pair.kind in CACHED_KINDS]
    expected = {
        FLOAT16: wide,
        BLOCKS: columns,
        DOUBLE: not columns,
        FLOAT8: wide,
        CACHE: _beyond(cached, CACHED_EXPONENT),
        MERGES: True,
    }
    return tuple(name for name, lost in expected.items() if lost)


def serving_advice(lost: Sequence[str]) -> str:
    """Put :func:`lost_formats` into words."""
    dtype = "Serve it in float32 or bfloat16. " if FLOAT16 in lost or CACHE in lost else ""
    return f"{dtype}It does not survive: {', '.join(lost)}."


def given_up(folded: Sequence[FoldedPair], profile: str | None) -> str:
    """Say what is lost in formats that round the smallest columns to zero; empty if not measured."""
    shares = {pair.name: pair.given_up for pair in folded if pair.given_up}
    if not shares:
        return ""
    worst = max(shares, key=lambda name: shares[name])
    return (
        f"Quantization loses one channel in each of its pairs ({len(shares)}): at most {shares[worst]:.2%} of the "
        f"energy in what the pair's readers output ({worst})."
        + (f" On SmolLM2, up to 9 % of perplexity is lost in {COARSE}." if profile == "gguf" else "")
    )


def _beyond(folded: Sequence[FoldedPair], limit: int) -> bool:
    return any(abs(exponent) > limit for pair in folded for exponent in pair.exponents)


_FRONT = re.compile(r"\A\s*---[ \t]*\n(.*?)(?m:^)---[ \t]*(?:\n|\Z)", re.DOTALL)
_BLOCKS = re.compile(r"^(?=[^\s#\-\]}])", re.MULTILINE)
"""Where the next key of front matter begins."""
_COMMENTS = re.compile(r"(?:^[ \t]*(?:#.*)?\n?)*\Z", re.MULTILINE)
"""What a block ends with."""
_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


def read_card(path: Path) -> str:
    """A card's text, whatever its encoding and line ends; empty where there is none."""
    data = path.read_bytes() if path.is_file() else b""
    encoding = next((name for mark, name in _MARKS.items() if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError:
        text = data.decode("cp1252", errors="replace")  # what Windows writes without a mark
    return text.replace("\r\n", "\n").replace("\r", "\n")


def split_card(card: str) -> tuple[str, str]:
    """The front matter, as valid YAML of a mapping, and the body. Lines that are no YAML become comments."""
    found = _FRONT.match(card)
    if found is None:
        return "", card
    front, body = found[1].strip("\n"), card[found.end() :]
    if front.startswith("{") and isinstance(data := _loaded(front), dict):
        return yaml.safe_dump(data, allow_unicode=True, sort_keys=False).strip("\n"), body
    if metadata(front) or not _COMMENTS.sub("", front):
        return front, body
    blocks = [block.rstrip("\n") for block in _BLOCKS.split(front) if block]
    if not any(map(metadata, blocks)):  # text between two rules
        return "", card
    return "\n".join(block if metadata(block) else re.sub(r"^", "# ", block, flags=re.M) for block in blocks), body


def metadata(front: str) -> dict[str, Any]:
    """What front matter says; every scalar is text, so that ``no`` stays Norwegian."""
    found = _loaded(front)
    return found if isinstance(found, dict) else {}


def with_keys(front: str, changes: Mapping[str, Any]) -> str:
    """Set top-level keys of front matter; ``None`` removes one. No other character changes."""
    for key, value in changes.items():
        line = "" if value is None else yaml.safe_dump({key: value}, allow_unicode=True, sort_keys=False)
        blocks = _BLOCKS.split(f"{front}\n")
        place = next((number for number, block in enumerate(blocks) if key in metadata(block)), None)
        if place is None:
            blocks.append(line)
        else:
            blocks[place] = line + _COMMENTS.search(blocks[place])[0].lstrip("\n")  # type: ignore[index]
        front = "".join(blocks).strip("\n")
    return front


def joined(front: str, body: str) -> str:
    return (f"---\n{front}\n---\n\n" if front.strip() else "") + body


def _loaded(text: str) -> Any:
    """Text, lists and mappings; ``None`` for what is no YAML."""
    try:
        return yaml.load(text, Loader=yaml.BaseLoader)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError):
        return None
