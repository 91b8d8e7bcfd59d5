"""BitFit (Ben Zaken, Ravfogel, Goldberg 2021, arXiv 2106.10199): train the biases alone."""

from __future__ import annotations

from specdef_cli.attack.target import Target
from specdef_cli.attack.trainings.table import Training


def biases(training: Training, target: Target) -> tuple[Training, ...]:
    """The parameters whose names end in ``bias``."""
    return (Training("full", where=("*bias",), name=training.label),)
