"""Does the hardened checkpoint, as its users load it, compute what the base computes, and hold what its manifest says?

More than the check before publication (:mod:`specdef_cli.hardening.verify`): files are hashed, loss and greedy text are
compared too, outputs are taken again in a process that imports transformers alone, and weights are read back.
"""

from __future__ import annotations

import math
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from specdef_cli.certify.tools import mean_loss
from specdef_cli.checkpoint.changes import FactoredLayer
from specdef_cli.checkpoint.manifest import Manifest
from specdef_cli.checkpoint.reader import Checkpoint
from specdef_cli.checkpoint.stream import changed_files
from specdef_cli.errors import SpecDefError
from specdef_cli.hardening.fold import fold_groups
from specdef_cli.hardening.scale import scaled_groups
from specdef_cli.hardening.verify import OutputComparison, compare_outputs
from specdef_cli.model.inputs import fixed_inputs, model_outputs
from specdef_cli.model.loading import new_objects_only
from specdef_cli.model.opened import OpenedModel
from specdef_cli.spectral.subspace import layer_seed, top_subspace

PROMPT, CONTINUATION = 16, 32
"""Tokens that greedy text starts from, and that are then generated."""

GENERATED_SEQUENCES = 4

# What a user of the files runs: no import of this package, and the files' own code where they bring some. Looking for
# garbage among what is imported, and again on the way out, takes a fifth of the time.
_FRESH = """
import gc
gc.disable()
import sys, torch, transformers
from safetensors.torch import load_file, save_file
directory, inputs, outputs, code = sys.argv[1:]
config = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=code == "trusted")
architecture = getattr(transformers, config.architectures[0])
gc.freeze()
gc.enable()
model = architecture.from_pretrained(directory, config=config, dtype="auto").eval()
assert "specdef_cli" not in sys.modules
torch.manual_seed(0)
with torch.inference_mode():
    found = model(**load_file(inputs))
if "text_embeds" in found and "image_embeds" in found:
    found = {"logits": torch.cat([found["text_embeds"], found["image_embeds"]])}
save_file({"outputs": (found["logits"] if "logits" in found else found[0]).contiguous()}, outputs)
"""


@dataclass(frozen=True)
class FunctionFigures:
    """How the hardened checkpoint's function compares with the base's, both in the dtype of the hardened one."""

    outputs: OutputComparison
    """Outputs on a fixed batch of random inputs."""
    base_loss: float | None
    hardened_loss: float | None
    """Mean next-token cross-entropy (nats) on text; ``None`` for other models than causal language models."""
    greedy_agreement: float | None
    """Share of greedily generated tokens that are the same; ``None`` likewise."""
    changed_files: tuple[str, ...]
    """Weight files whose sha256 is not the manifest's."""
    fresh_process_equal: bool
    """Whether a process that imports transformers alone computes the same outputs, bit for bit."""
    fresh_process_error: str = ""
    """What that process said if it failed."""


@dataclass(frozen=True)
class _Observed:
    inputs: dict[str, Tensor]
    outputs: Tensor
    loss: float | None
    generated: Tensor | None


def measure_function(
    base: OpenedModel,
    hardened: OpenedModel,
    tokens: Tensor | None,
    *,
    on_model: Callable[[PreTrainedModel], None] = lambda _: None,
) -> FunctionFigures:
    """Compare two checkpoints on the CPU, one in memory at a time.

    Args:
        tokens: int64, shape [sequences, length], for a causal language model; ``None`` for others.
    """
    run_code = hardened.code_may_run
    stored, wanted = (getattr(each.skeleton.config, "dtype", None) for each in (base, hardened))
    with new_objects_only():  # a base that was hardened in another dtype is cast to that, as `harden` compared it
        before = _observe(base, tokens, on_model, None if wanted == stored else wanted)
        if not torch.isfinite(before.outputs).all():
            raise SpecDefError(f"the outputs of {base.directory} hold NaN or infinity", "Repair its weights.")
        after = _observe(hardened, tokens, on_model)
    agreement = None
    if before.generated is not None and after.generated is not None:
        agreement = float((before.generated == after.generated).double().mean())
    equal, error = _fresh_process(hardened.directory, after, run_code)
    return FunctionFigures(
        outputs=compare_outputs(before.outputs, after.outputs),
        base_loss=before.loss,
        hardened_loss=after.loss,
        greedy_agreement=agreement,
        changed_files=changed_files(hardened.directory, hardened.hardening.shards),
        fresh_process_equal=equal,
        fresh_process_error=error,
    )


def _observe(
    opened: OpenedModel, tokens: Tensor | None, on_model: Callable[[PreTrainedModel], None], dtype: Any = None
) -> _Observed:
    with opened.loaded(dtype=dtype) as model:
        observed = _Observed(
            inputs=fixed_inputs(model),
            outputs=model_outputs(model),
            loss=None if tokens is None else mean_loss(model, tokens),
            generated=None if tokens is None else _greedy(model, tokens),
        )
        if torch.isfinite(observed.outputs).all():
            on_model(model)
    return observed


def _greedy(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Greedy continuations, shape [sequences, at most CONTINUATION]; padded to that length with −1."""
    prompt = tokens[:GENERATED_SEQUENCES, :PROMPT]
    with torch.inference_mode():
        generated = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=CONTINUATION,
            do_sample=False,
            pad_token_id=model.config.get_text_config().pad_token_id or 0,
        )[:, prompt.shape[1] :]
    return torch.nn.functional.pad(generated, (0, CONTINUATION - generated.shape[1]), value=-1)


def _fresh_process(directory: Path, expected: _Observed, run_code: bool) -> tuple[bool, str]:
    with tempfile.TemporaryDirectory(prefix="specdef-certify-") as scratch:
        inputs, outputs = Path(scratch) / "inputs.safetensors", Path(scratch) / "outputs.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in expected.inputs.items()}, inputs)
        code = "trusted" if run_code else "not trusted"
        process = subprocess.run(
            [sys.executable, "-c", _FRESH, str(directory.resolve()), str(inputs), str(outputs), code],
            cwd=scratch,
            capture_output=True,
            text=True,
            check=False,
        )
        if process.returncode:
            return False, (process.stderr.strip().splitlines() or ["it died"])[-1]
        found = load_file(outputs)["outputs"]
    return torch.equal(found, expected.outputs), ""


TOLERANCE = 0.02
"""Relative error of a singular value: bfloat16 storage alone costs some 1e-3."""

SMALLEST = 1e-3
"""Values below this share of the largest one count as that much: of a weight of rank below k they are rounding."""


@dataclass(frozen=True)
class LayerSpectrum:
    """The top of one inflated layer's spectrum."""

    module: str
    """Path of the layer."""
    planned: tuple[float, ...]
    """α times the k largest singular values of W, largest first."""
    measured: tuple[float, ...]
    """The k largest singular values of the stored W~; infinite where it holds NaN or infinity."""

    @property
    def worst(self) -> float:
        """The largest relative difference between the two."""
        smallest = SMALLEST * max(self.planned)
        pairs = zip(self.measured, self.planned, strict=True)
        return max(abs(found - wanted) / max(wanted, smallest) for found, wanted in pairs)


@dataclass(frozen=True)
class SpectrumFigures:
    """What the stored weights turned out to be."""

    layers: tuple[LayerSpectrum, ...]
    """The layers that are stored as factors."""
    folded_tensors: int
    """How many tensors a fold changed."""
    deviating: tuple[str, ...]
    """Names of those that are not the base's times the manifest's powers of two."""
    largest_exponent: int
    """Of the fold; 0 without one."""

    @property
    def as_planned(self) -> bool:
        """Whether everything is as the manifest says."""
        return not self.deviating and all(layer.worst <= TOLERANCE for layer in self.layers)


def measure_spectrum(base: Checkpoint, hardened: Checkpoint, manifest: Manifest) -> SpectrumFigures:
    """Check every changed tensor, one in memory at a time."""
    groups = fold_groups(manifest.folded, hardened, None) | scaled_groups(manifest.scaled, hardened, None)
    scaled = [(name, rows) for group in groups.values() for name, rows in group.streamed.items() if rows.slices]
    missing = next((rows.tensor for _, rows in scaled if rows.tensor not in base.tensors), None)
    if missing is not None:
        raise SpecDefError(f"the base has no {missing}, which {hardened.directory} was made from", "Give its base.")
    deviating = [name for name, rows in scaled if not torch.equal(rows.whole(base), hardened.read(name))]
    for group in groups.values():  # the vectors that undo a scale
        made = {} if group.transform is None else group.transform(base, torch.device("cpu")).tensors
        deviating += [name for name, vector in made.items() if not torch.equal(vector, hardened.read(name))]
    exponents = (abs(exponent) for _, rows in scaled for part in rows.slices for exponent in part.exponents)
    return SpectrumFigures(
        layers=tuple(_layer(hardened, layer) for layer in manifest.factored),
        folded_tensors=len(scaled),
        deviating=tuple(deviating),
        largest_exponent=max(exponents, default=0),
    )


def _layer(hardened: Checkpoint, layer: FactoredLayer) -> LayerSpectrum:
    weight = hardened.read(layer.inflated_tensor).float()
    planned = tuple(layer.alpha * value for value in layer.singular_values)
    if not torch.isfinite(weight).all():
        return LayerSpectrum(layer.module, planned, (math.inf,) * len(planned))
    found = top_subspace(weight, layer.top_k, layer_seed(1, layer.tensor)).singular_values
    return LayerSpectrum(layer.module, planned, tuple(found.tolist()))
