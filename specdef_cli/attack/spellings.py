"""Short spellings: flags that say in another way what ``--variant`` and ``--training`` say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from specdef_cli.attack.trainings.table import Training
from specdef_cli.attack.variants.table import VARIANTS, Variant
from specdef_cli.errors import SpecDefError

DEFAULT_TRAININGS = ("full", "lora")


def variants_of(
    variants: Sequence[str] = (),
    *,
    expand: str | None = None,
    expansions: Sequence[str] = (),
    flags: Sequence[str] = (),
) -> tuple[Variant, ...]:
    """The variants that the command line asks for.

    Args:
        variants: As ``--variant`` takes them.
        expand: A growth factor, ``2x``: short for ``--variant width:2``.
        expansions: Other variants that grow the model than ``width``, by that factor where they take one.
        flags: Names of variants with a flag of their own.

    Raises:
        SpecDefError: A variant is unknown, or does not take the factor.
    """
    found = [Variant.parse(text) for text in (*variants, *flags)]
    for kind in expansions or (("width",) if expand is not None else ()):
        takes_factor = VARIANTS.choose(kind).factor is not None
        found.append(Variant.parse(f"{kind}:{expand}" if expand is not None and takes_factor else kind))
    return tuple(dict.fromkeys(found))


def trainings_of(
    trainings: Sequence[str] = (),
    *,
    globs: Sequence[str] = (),
    targets: Sequence[str] = (),
    rank: int | None = None,
) -> tuple[Training, ...]:
    """The trainings that the command line asks for; none where it leaves that open.

    Args:
        trainings: As ``--training`` takes them.
        globs: Names of parameters: ``full`` trains these alone.
        targets: Modules that every kind of adapter goes on that is not told where.
        rank: Of every kind of adapter that has one and is not told which.

    Raises:
        SpecDefError: A training is unknown, does not take what it is given, or contradicts ``globs``.
    """
    if not (trainings or globs or targets or rank is not None):
        return ()
    found = []
    for text in trainings or (("full",) if globs else DEFAULT_TRAININGS):
        training = Training.parse(text)
        choice = training.choice
        if globs and choice.where != "parameters":
            raise SpecDefError(
                f"--train {globs[0]} selects among the model's own parameters, and {training} trains none of them",
                "Use --training full with --train, or choose where adapters go: --training lora@q_proj.",
            )
        where = {"parameters": globs, "modules": targets}.get(choice.where or "", ())
        if where and not training.where:
            training = replace(training, where=tuple(where))
        if rank is not None and choice.size is not None and choice.size.meaning == "rank" and ":" not in text:
            training = replace(training, size=rank)
        found.append(training)
    return tuple(dict.fromkeys(found))
