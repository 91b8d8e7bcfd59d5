"""What is attacked: as much of a model as a plan depends on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from specdef_cli.attack.variants.table import Construction
from specdef_cli.checkpoint.manifest import Manifest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Task = Literal["causal-lm", "seq2seq-lm", "masked-lm", "sequence-classification", "image-classification"]


@dataclass(frozen=True)
class Target:
    """What is attacked.

    Attributes:
        manifest: ``None`` for a model that comes without one.
        task: What it is trained for.
        data, control, model: Fingerprints.
        control_model: Makes the control on the meta device, for trainings that depend on what a model consists of.
    """

    manifest: Manifest | None
    task: Task
    data: str
    control: str
    model: str
    control_model: Callable[[], PreTrainedModel]

    @property
    def constructions(self) -> frozenset[Construction]:
        """What the model has of what hardening makes."""
        if self.manifest is None:
            return frozenset()
        inserted: set[Construction] = {"inserted"} if self.manifest.inserted else set()
        return frozenset(inserted | ({"folded"} if self.manifest.folded else set()))

    @property
    def inserted(self) -> tuple[str, ...]:
        """Module paths of inserted layers."""
        return tuple(layer.module for layer in self.manifest.inserted) if self.manifest else ()
