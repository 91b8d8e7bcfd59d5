"""What is attacked: a task, a head, and as much of a model as a plan depends on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from specdef_cli.checkpoint.changes import Change
    from specdef_cli.checkpoint.manifest import Manifest
    from specdef_cli.hardening.recognise import Recognised

Task = Literal["causal-lm", "seq2seq-lm", "masked-lm", "sequence-classification", "image-classification"]
Problem = Literal["single_label_classification", "multi_label_classification", "regression"]


@dataclass(frozen=True)
class Head:
    """A checkpoint's own head, by its configuration."""

    labels: int = 0
    problem: Problem | None = None  # None where the configuration leaves it to the labels
    names: Mapping[str, int] = field(default_factory=dict)
    """The number of each class by its name; empty where the configuration names none."""


@dataclass(frozen=True)
class Target:
    """The model under attack, its control, and its data."""

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
        return max(1.0 if self.manifest is None else self.manifest.largest_alpha, self.recognised.alpha)
