"""What a change to a model cost."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import computed_field


@dataclass(frozen=True)
class Growth:
    """What a variant did to the layers that it changed."""

    layers: int
    """How many layers were changed."""
    parameters_before: int
    parameters_after: int
    """Frozen ones included, as before."""
    bytes_added: int
    """Negative where the change made the model smaller."""

    def __add__(self, other: Growth) -> Growth:
        """Both changes, of different layers."""
        return Growth(
            self.layers + other.layers,
            self.parameters_before + other.parameters_before,
            self.parameters_after + other.parameters_after,
            self.bytes_added + other.bytes_added,
        )

    @computed_field  # type: ignore[prop-decorator]
    @property
    def parameters_added(self) -> int:
        """Negative where the change made the model smaller."""
        return self.parameters_after - self.parameters_before

    @computed_field  # type: ignore[prop-decorator]
    @property
    def layers_times(self) -> float:
        """How many times as large the changed layers are; 1 where none was changed."""
        return self.parameters_after / self.parameters_before if self.parameters_before else 1.0
