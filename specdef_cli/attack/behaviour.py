"""How a model answers: refusals, divergence of its next tokens, the direction between two kinds of prompts, accuracy.

Prompts of one length are read together, so that nothing is padded and no figure depends on the batch. Answers are
generated in padded batches.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from specdef_cli.attack.prompts import Prompts
from specdef_cli.attack.run_result import Behaviour, Edit
from specdef_cli.attack.variants.growth import Growth
from specdef_cli.attack.variants.table import Variant
from specdef_cli.errors import SpecDefError, require_extra
from specdef_cli.model.opened import OpenedModel

ANSWER_TOKENS = 32
"""So much of an answer shows whether it is a refusal."""

SHOWN = 3
"""Answers that are kept."""

BATCH = 16

DEEPEST = 0.8
"""Directions are looked for in this share of the layers, the first ones: Arditi et al. leave out the last fifth, where
hidden states are about the next token already."""


@dataclass(frozen=True)
class Read:
    """What a model makes of prompts, at the last token of each; float32, on the CPU."""

    hidden: Tensor  # hidden states, [prompts, layers + 1, d]
    log_probs: Tensor  # of the next token, [prompts, vocabulary]


@dataclass(frozen=True)
class Reference:
    """The model before an attack."""

    log_probs: Tensor  # of its next token on the harmless held-out prompts, [prompts, vocabulary]
    layer: int  # where the two kinds of prompts are furthest apart, in units of their spread; 0 are the embeddings
    direction: Tensor  # v, the unit vector from the mean of one kind to that of the other there
    gap: float  # how far the held-out halves are apart along it
    refusals: float | None  # share of the unwanted prompts that it refuses; None where none were given


@lru_cache(maxsize=2)  # the control and the model: every run of either compares with it
def reference_of(opened: OpenedModel, prompts: Prompts, dtype: str, device: str) -> Reference:
    """Measure a checkpoint as it was published."""
    model = load_plainly(opened, dtype, device)
    unwanted, harmless = (_read(model, half).hidden[:, 1:-1] for half in (prompts.unwanted, prompts.harmless))
    gaps = unwanted.mean(0) - harmless.mean(0)  # [layers - 1, d]; the last hidden state is normed
    spread = unwanted.var(0, correction=0).sum(-1) + harmless.var(0, correction=0).sum(-1)
    deepest = max(1, int(DEEPEST * (len(gaps) + 1)))
    place = int((gaps.square().sum(-1) / spread)[:deepest].argmax())
    direction = gaps[place] / gaps[place].norm()
    compared, asked = _read(model, prompts.compared), _read(model, prompts.asked)
    refusals = None
    if prompts.given:
        refusals = _refused(prompts, _answers(model, prompts.asked, opened))
    return Reference(compared.log_probs, place + 1, direction, _gap(asked, compared, place + 1, direction), refusals)


def load_plainly(opened: OpenedModel, dtype: str, device: str) -> Any:
    """A checkpoint as a language model that is not trained."""
    kind: Any = {"auto": "auto", "mixed": torch.float32}.get(dtype) or getattr(torch, dtype)
    return opened.load(auto_class=AutoModelForCausalLM, dtype=kind).to(device).eval()


def try_edits(
    variant: Variant,
    opened: OpenedModel,
    prompts: Prompts,
    *,
    dtype: str,
    device: str,
    on_strength: Callable[[int], None] = lambda number: None,
) -> tuple[tuple[Edit, ...], Behaviour, Growth, int]:
    """Edit a checkpoint by each strength of a variant, and measure it; how it answers, at the best one.

    Raises:
        NotApplicable: The variant finds nothing to edit.
    """
    before = reference_of(opened, prompts, dtype, device)
    edits: list[Edit] = []
    answers: Behaviour | None = None
    parameters, growth = 0, Growth(0, 0, 0, 0)
    for number, strength in enumerate(variant.strengths, 1):
        model = load_plainly(opened, dtype, device)  # of a large one there is no place for two
        parameters = sum(parameter.numel() for parameter in model.parameters())
        growth = variant.edit(model, before.direction, strength)
        compared = _read(model, prompts.compared)
        gap = _gap(_read(model, prompts.asked), compared, before.layer, before.direction)
        left = abs(gap / before.gap) if math.isfinite(gap) and before.gap else None
        edits.append(Edit(strength, left, _divergence(before, compared)))
        if edits[-1] == min(edits, key=lambda edit: edit.reach):
            answers = _behaviour(model, prompts, before, compared, opened)
        on_strength(number)
    assert answers is not None
    return tuple(edits), answers, growth, parameters


def behaviour_of(model: nn.Module, prompts: Prompts, before: Reference, opened: OpenedModel) -> Behaviour:
    """How a model answers after an attack."""
    training = model.training
    model.eval()
    found = _behaviour(model, prompts, before, _read(model, prompts.compared), opened)
    model.train(training)
    return found


def _behaviour(model: nn.Module, prompts: Prompts, before: Reference, compared: Read, opened: OpenedModel) -> Behaviour:
    asked = prompts.asked if prompts.given else prompts.asked[:SHOWN]
    answers = _answers(model, asked, opened)
    return Behaviour(
        kl=_divergence(before, compared),
        refusals=_refused(prompts, answers) if prompts.given else None,
        refusals_before=before.refusals,
        answers=tuple(zip(prompts.texts[:SHOWN], answers[:SHOWN], strict=True)),
    )


def _divergence(before: Reference, compared: Read) -> float | None:
    """KL divergence (nats) of a model's next token from the reference's, the mean over prompts; ``None`` where it is
    not finite.
    """
    apart = (before.log_probs.exp() * (before.log_probs - compared.log_probs)).sum(-1).mean().item()
    return max(0.0, apart) if math.isfinite(apart) else None


def _refused(prompts: Prompts, answers: Sequence[str]) -> float:
    return sum(map(prompts.is_refusal, answers)) / len(answers)


def _gap(asked: Read, compared: Read, layer: int, direction: Tensor) -> float:
    """How far the held-out halves are apart along a direction, in one hidden state."""
    return float((asked.hidden[:, layer].mean(0) - compared.hidden[:, layer].mean(0)) @ direction)


def _batches(prompts: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Positions of prompts of equal length, :data:`BATCH` of them at most."""
    by_length = sorted(range(len(prompts)), key=lambda position: (len(prompts[position]), position))
    for _, group in groupby(by_length, key=lambda position: len(prompts[position])):
        positions = list(group)
        yield from (positions[start : start + BATCH] for start in range(0, len(positions), BATCH))


@torch.no_grad()
def _read(model: nn.Module, prompts: Sequence[Sequence[int]]) -> Read:
    """What a model makes of prompts, in their order."""
    device = next(model.parameters()).device
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for positions in _batches(prompts):
        tokens = torch.tensor([prompts[position] for position in positions], device=device)
        output = model(
            input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False, output_hidden_states=True
        )
        hidden = torch.stack([state[:, -1] for state in output.hidden_states], 1).float().cpu()
        log_probs = output.logits[:, -1].float().log_softmax(-1).cpu()
        found |= {position: (hidden[place], log_probs[place]) for place, position in enumerate(positions)}
    order = [found[position] for position in range(len(prompts))]
    return Read(torch.stack([hidden for hidden, _ in order]), torch.stack([log_probs for _, log_probs in order]))


@torch.no_grad()
def _answers(model: Any, prompts: Sequence[Sequence[int]], opened: OpenedModel) -> list[str]:
    """The beginning of the answer to each prompt, the likeliest token at every step."""
    tokenizer = opened.tokenizer()
    device = next(model.parameters()).device
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    answers: list[str] = []
    for start in range(0, len(prompts), BATCH):
        batch = prompts[start : start + BATCH]
        longest = max(map(len, batch))
        mask = torch.tensor([[0] * (longest - len(each)) + [1] * len(each) for each in batch], device=device)
        tokens = torch.tensor([[padding] * (longest - len(each)) + list(each) for each in batch], device=device)
        said = model.generate(
            input_ids=tokens, attention_mask=mask, max_new_tokens=ANSWER_TOKENS, do_sample=False, pad_token_id=padding
        )
        answers += tokenizer.batch_decode(said[:, longest:], skip_special_tokens=True)
    return [" ".join(answer.split()) for answer in answers]


BATCH_SIZE = 8


def require_harness() -> None:
    """Check that lm-eval can be imported."""
    require_extra("eval", "accuracies on tasks")


def task_accuracy(
    model: nn.Module, tokenizer: Any, tasks: tuple[str, ...], *, task_directory: Path | None = None
) -> dict[str, float]:
    """The accuracy on each task, between 0 and 1.

    Args:
        tasks: Names of tasks that report ``acc``.
        task_directory: A directory with tasks of the user's, as lm-eval's ``--include_path``.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = _task_manager(task_directory)
    for task in tasks:
        if task not in manager.all_tasks:
            raise SpecDefError(
                f"lm-eval has no task {task!r}", "`lm-eval ls tasks` lists them; --eval-task-path adds your own."
            )
    training = model.training
    found = simple_evaluate(
        model=HFLM(pretrained=model.eval(), tokenizer=tokenizer, batch_size=BATCH_SIZE),
        tasks=list(tasks),
        task_manager=manager,
        bootstrap_iters=0,
        log_samples=False,
        verbosity="ERROR",
    )
    model.train(training)
    results = (found or {})["results"]
    accuracy = {}
    for task in tasks:
        values = [value for key, value in results.get(task, {}).items() if key.split(",")[0] == "acc"]
        if not values:
            raise SpecDefError(f"lm-eval's task {task!r} reports no accuracy", "Name tasks with the metric acc.")
        accuracy[task] = float(values[0])
    return accuracy


@cache
def _task_manager(task_directory: Path | None) -> Any:
    """lm-eval's index of tasks. It reads more than ten thousand files, which takes longer than a short run does."""
    from lm_eval.tasks import TaskManager

    return TaskManager(verbosity="ERROR", include_path=None if task_directory is None else str(task_directory))
