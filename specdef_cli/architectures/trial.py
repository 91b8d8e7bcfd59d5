"""A model's forward pass on the meta device: does it run, and whose weights does it read past their modules?

A linear layer or a norm can only be replaced where the model calls it. Some read the weight themselves instead (WavLM's
attention, Mamba's ``dt_proj``), which nothing but a run shows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from specdef_cli.runtime.fixed_batch import fixed_inputs


@dataclass(frozen=True)
class Trial:
    """What came of it.

    Attributes:
        inputs: Names of what the model was given; empty where nothing can be made up for it.
        error: What ended it early.
        certain: Whether that error is the model's own; the meta device has others, as it knows no values.
        read_past: Modules whose own weights were read while they were not running.
    """

    inputs: tuple[str, ...]
    error: Exception | None
    certain: bool
    read_past: frozenset[str]


def try_out(model: nn.Module) -> Trial:
    """Run a model on the meta device once, where it computes shapes alone."""
    inputs: tuple[str, ...] = ()
    reads = _Reads(model)
    training = model.training
    try:
        for part in model.modules():  # other ways to run experts ask for values
            if isinstance(part, PreTrainedModel) and part._can_set_experts_implementation():
                part.config._experts_implementation_internal = "batched_mm"
        batch = fixed_inputs(model.eval())
        inputs = tuple(batch)
        batch.pop("attention_mask", None)  # all ones, which models look at the values to find out
        batch = {name: value.to("meta") if isinstance(value, Tensor) else value for name, value in batch.items()}
        with torch.inference_mode(), torch.device("meta"), reads:
            model(**batch)
    except Exception as error:
        certain = not reads.guessed and not isinstance(error, NotImplementedError) and "meta" not in str(error).lower()
        return Trial(inputs, error, certain, frozenset(reads.found))
    finally:
        reads.remove()
        model.train(training)
    return Trial(inputs, None, True, frozenset(reads.found))


_QUESTIONS = (Tensor.__bool__, Tensor.__contains__, Tensor.item)


class _Reads(TorchFunctionMode):
    """Notices parameters that go into a computation while no module that owns them is running.

    Where a model asks whether a value is so, the answer is no.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.guessed = False
        self._running: Counter[str] = Counter()
        self._owners: dict[int, set[str]] = {}
        self._hooks = []
        for path, module in model.named_modules():
            own = list(module.parameters(recurse=False))
            for parameter in own:
                self._owners.setdefault(id(parameter), set()).add(path)
            if own:
                self._hooks.append(module.register_forward_pre_hook(partial(self._count, path, 1)))
                self._hooks.append(module.register_forward_hook(partial(self._count, path, -1)))

    def remove(self) -> None:
        """Take the hooks off the model again."""
        for hook in self._hooks:
            hook.remove()

    def _count(self, path: str, step: int, *_: Any) -> None:
        self._running[path] += step

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func in _QUESTIONS and args[0].device.type == "meta":
            self.guessed = True
            return False
        result = func(*args, **(kwargs or {}))
        computed = isinstance(result, Tensor) or (
            isinstance(result, tuple | list) and any(map(torch.is_tensor, result))
        )
        for value in chain(args, (kwargs or {}).values()) if computed else ():  # not its dtype or its shape
            owners = self._owners.get(id(value), set()) if isinstance(value, nn.Parameter) else set()
            if not any(self._running[path] for path in owners):
                self.found |= owners
        return result
