"""What is attacked: as much of a model as a plan depends on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from specdef_cli.checkpoint.manifest import Change, Manifest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from specdef_cli.hardening.recognise import Recognised

Task = Literal["causal-lm", "seq2seq-lm", "masked-lm", "sequence-classification", "image-classification"]


@dataclass(frozen=True)
class Target:
    """What is attacked."""

    manifest: Manifest | None  # None for a model that comes without one
    task: Task
    data: str
    control: str
    model: str  # these three are fingerprints
    recognised: Recognised  # what the model's weights show of how it was made
    control_model: Callable[[], PreTrainedModel]
    """Makes the control on the meta device, for trainings that depend on what a model consists of."""
    prompts: str = ""  # fingerprint of the prompts that edits tell apart; empty where there are none
    asked: bool = False  # whether every attack is followed by them
    chat: bool = False

    @property
    def constructions(self) -> frozenset[Change]:
        """What the model has of what hardening makes, by its manifest and by its weights.

        A model without a manifest counts as folded, whatever its weights show: to rebalance an ordinary model costs an
        attack, and to leave it out where a fold is too small to be seen would flatter the model.
        """
        if self.manifest is None:
            return self.recognised.constructions | {"folded"}
        changes: dict[Change, tuple[Any, ...]] = {
            "factored": self.manifest.factored,
            "folded": self.manifest.folded,
            "scaled": self.manifest.scaled,
        }
        return self.recognised.constructions | frozenset(name for name, changed in changes.items() if changed)

    @property
    def alpha(self) -> float:
        """The largest factor by which any layer or channel is inflated; 1 for an ordinary model."""
        return max(largest_alpha(self.manifest), self.recognised.alpha)


def largest_alpha(manifest: Manifest | None) -> float:
    """The largest factor by which a manifest says that any layer or channel was inflated; 1 without one."""
    if manifest is None:
        return 1.0
    alphas = [layer.alpha for layer in manifest.factored]
    alphas += [2.0 ** abs(exponent) for pair in manifest.folded for exponent in pair.exponents]
    alphas += [
        2.0 ** abs(exponent)
        for module in manifest.scaled
        for side in module.scales.values()
        for exponent in side.exponents
    ]
    return max(alphas, default=1.0)
