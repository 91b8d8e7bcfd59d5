"""A second device for machines without one: tensors that say they live elsewhere, and refuse the company of the CPU's.

Values are computed on the CPU, so that results can be compared with those of the CPU itself; a tensor that was left
there meets one that was moved and raises, as on a GPU. Unlike torch's fake tensors, ``item()`` and every linear-algebra
routine work.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

DEVICE = torch.device("privateuseone", 0)

aten = torch.ops.aten
# Between devices by design: copies, and an index that torch moves itself.
CROSSING = {aten.copy_.default, aten._to_copy.default}


class Elsewhere(Tensor):
    """A tensor that says that it lives on ``DEVICE``."""

    on_cpu: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> Elsewhere:
        wrapper = Tensor._make_wrapper_subclass(
            cls, values.shape, values.stride(), values.storage_offset(), dtype=values.dtype, device=DEVICE
        )
        wrapper.on_cpu = values
        return wrapper

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Elsewhere({self.on_cpu})"

    def tolist(self) -> Any:
        """As of any tensor; torch refuses it for subclasses."""
        return self.on_cpu.tolist()

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return _run(function, args, kwargs or {})


class _Creation(TorchDispatchMode):
    """Takes the calls without a tensor of ``DEVICE`` that name it: factories and moves to it."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})


def _run(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors: list[Tensor] = []
    tree_map(lambda leaf: tensors.append(leaf) if isinstance(leaf, Tensor) else None, (args, kwargs))
    moved = any(isinstance(tensor, Elsewhere) for tensor in tensors)
    stranger = next((tensor for tensor in tensors if not isinstance(tensor, Elsewhere) and tensor.dim()), None)
    if moved and stranger is not None and function not in CROSSING:
        raise RuntimeError(
            f"{function}: expected all tensors to be on the same device, found at least two devices, {DEVICE} and cpu "
            f"(a tensor of shape {tuple(stranger.shape)})"
        )
    device = kwargs.get("device")
    if device is not None and torch.device(device).type == DEVICE.type:
        kwargs = {**kwargs, "device": torch.device("cpu")}
        moved = True
    elif device is not None:
        moved = False
    given = tree_map(lambda leaf: leaf.on_cpu if isinstance(leaf, Elsewhere) else leaf, (args, kwargs))
    result = function(*given[0], **given[1])
    if function is aten.copy_.default or (function._schema.name.endswith("_") and isinstance(args[0], Tensor)):
        return args[0]
    if "out" in kwargs:
        return kwargs["out"]
    return tree_map(lambda leaf: Elsewhere(leaf) if moved and isinstance(leaf, Tensor) else leaf, result)


@contextmanager
def other_device() -> Iterator[torch.device]:
    """Within it, ``DEVICE`` can be moved to and created on; torch counts it as the process's accelerator ever after."""
    _setup_privateuseone_for_python_backend("elsewhere")
    with _Creation():
        yield DEVICE
