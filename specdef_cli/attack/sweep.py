"""The plan: which runs make an honest answer.

An attacker sweeps the learning rate downwards. With Adam, α acts as a hidden multiplier of the rate on the layers
after an inflated one, so that η₀/α trains a hardened model about as η₀ trains the original. A sweep that ends at the
usual rates would report a resistance that isn't there; the default one goes on to a decade below η₀/α.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from specdef_cli.attack.optimizers import optimizer_choice
from specdef_cli.attack.options import AttackOptions, Recipe, Task
from specdef_cli.attack.spec import RunSpec, Subject, Variant
from specdef_cli.attack.variants import informed_variants
from specdef_cli.checkpoint.manifest import Manifest

MOST_RATES = 12
"""More decades than this (α beyond about 10⁹) are sampled every second, third … decade."""


def largest_alpha(manifest: Manifest) -> float:
    """The largest factor by which any layer or channel was inflated."""
    alphas = [layer.alpha for layer in manifest.inserted]
    alphas += [2.0 ** abs(exponent) for pair in manifest.folded for exponent in pair.exponents]
    return max(alphas, default=1.0)


def default_learning_rates(optimizer: str, alpha: float) -> tuple[float, ...]:
    """Decades from the optimizer's largest usual rate η₀ to one below η₀/α**p (its smallest usual rate at least),
    largest first.

    Args:
        optimizer: A name of the table.
        alpha: The largest inflation, 1 for an ordinary model.
    """
    choice = optimizer_choice(optimizer)
    top = round(math.log10(max(choice.learning_rates)))
    bottom = round(math.log10(min(choice.learning_rates)))
    if alpha > 1:
        bottom = min(bottom, top - choice.alpha_power * math.ceil(math.log10(alpha) - 1e-9) - 1)
    stride = math.ceil((top - bottom + 1) / MOST_RATES)
    exponents = [*range(top, bottom, -stride), bottom]
    return tuple(float(f"1e{exponent}") for exponent in exponents)


def default_sweep(
    options: AttackOptions, manifest: Manifest | None, *, task: Task, data: str, control: str, model: str
) -> tuple[RunSpec, ...]:
    """Every run of an attack, the control's first.

    The control and the attacks on what is, or has again become, an ordinary model run at the optimizer's usual rates;
    the hardened model as it is, and the expansions that train an inflated factor, at the whole sweep. Rates given by
    the user hold for all. Every recipe has a control of its own, and whoever knows the construction is always among
    the attackers.

    Args:
        options: What the user decided.
        manifest: Of the model under attack; ``None`` if this package did not harden it.
        task: What the architecture is trained for.
        data, control, model: Fingerprints.
    """
    recipes: tuple[Recipe, ...] = options.recipes or (("full",) if options.train else ("full", "lora"))
    usual = options.learning_rates or optimizer_choice(options.optimizer).learning_rates
    swept = options.learning_rates or default_learning_rates(
        options.optimizer, largest_alpha(manifest) if manifest else 1.0
    )

    def runs(subject: Subject, variant: Variant, recipe: Recipe, rates: Sequence[float]) -> list[RunSpec]:
        lora = recipe == "lora"
        first = RunSpec(
            subject=subject,
            checkpoint=control if subject == "control" else model,
            data=data,
            task=task,
            variant=variant,
            recipe=recipe,
            lora_targets=options.lora_targets if lora else (),
            lora_rank=options.lora_rank if lora else None,
            lora_alpha=(options.lora_alpha or 2.0 * options.lora_rank) if lora else None,
            train=options.train,
            optimizer=options.optimizer,
            learning_rate=rates[0],
            schedule=options.schedule,
            warmup_steps=options.warmup_steps,
            max_grad_norm=options.max_grad_norm,
            weight_decay=options.weight_decay,
            steps=options.steps,
            batch_size=options.batch_size,
            sequence_length=options.sequence_length,
            eval_every=options.eval_interval,
            seed=options.seeds[0],
            dtype=options.dtype,
        )
        return [replace(first, learning_rate=rate, seed=seed) for rate in rates for seed in options.seeds]

    plain = Variant()
    plan: list[RunSpec] = []
    for recipe in recipes:
        plan += runs("control", plain, recipe, usual)
    for recipe in recipes:
        plan += runs("model", plain, recipe, swept)
    for variant in informed_variants(manifest):
        for recipe in recipes if options.collapse or options.rebalance else recipes[:1]:
            plan += runs("model", variant, recipe, usual)
    if options.freeze_compensation:
        # It is the compensation, which reads α-fold activations, that needs small rates. Without it the usual ones do.
        plan += runs("model", Variant("freeze-compensation"), recipes[0], usual)
    for expansion in options.expansions:
        variant = Variant(expansion.kind, None if expansion.kind == "inject" else expansion.factor)
        plan += runs("model", variant, recipes[0], swept if expansion.kind == "depth" else usual)
    return tuple(dict.fromkeys(plan))
