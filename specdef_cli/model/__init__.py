"""Make the classes of transformers and diffusers load hardened directories after ``import specdef_cli``.

``import specdef_cli`` must stay cheap, and transformers with torch takes seconds to import. Neither library has a
plugin mechanism, so the registration waits: a finder at the head of ``sys.meta_path`` runs it right after one of the
modules that hold the registries is imported, or at once where that has happened already. For the same reason the names
of this room are looked up when they are first used.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specdef_cli.model.configuration_specdef import SpecDefLinear, SpecDefScaled
    from specdef_cli.model.loading import load_model, load_tokenizer, without_progress_bars

__all__ = ["SpecDefLinear", "SpecDefScaled", "load_model", "load_tokenizer", "without_progress_bars"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    runtime = _runtime()
    return getattr(runtime if name.startswith("SpecDef") else importlib.import_module(f"{__name__}.loading"), name)


def _runtime() -> Any:
    """``configuration_specdef``, whole: what it imports first has a callback below that imports it."""
    importlib.import_module("transformers.quantizers.auto")
    return importlib.import_module(f"{__name__}.configuration_specdef")


Callback = Callable[[], None]


class AfterImport(importlib.abc.MetaPathFinder):
    """Calls a function after a module was imported; it asks the other finders for the module."""

    def __init__(self, callbacks: dict[str, Callback]) -> None:
        self.callbacks = callbacks

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self.callbacks:
            return None
        for finder in sys.meta_path:
            if finder is self:
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None and spec.loader is not None:
                self._call_after(spec.loader, self.callbacks.pop(fullname))
                return spec
        return None

    @staticmethod
    def _call_after(loader: importlib.abc.Loader, callback: Callback) -> None:
        exec_module = loader.exec_module

        def exec_then_call(module: types.ModuleType) -> None:
            exec_module(module)
            callback()

        loader.exec_module = exec_then_call  # type: ignore[method-assign]


def _register_config() -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    CONFIG_MAPPING.register(_runtime().MODEL_TYPE, _runtime().SpecDefConfig, exist_ok=True)


def _register_quantizer() -> None:
    _runtime().register_quantizer(replace=True)


def _register_diffusers_quantizer() -> None:
    _runtime()
    from diffusers.quantizers import auto

    from specdef_cli.model import diffusion

    auto.AUTO_QUANTIZER_MAPPING[diffusion.METHOD] = diffusion.SpecDefDiffusersQuantizer
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[diffusion.METHOD] = diffusion.SpecDefDiffusersConfig


def register() -> None:
    """Register the runtime with both libraries, now or as soon as they are imported. Calling it again is harmless."""
    if any(isinstance(finder, AfterImport) for finder in sys.meta_path):
        return
    waiting = {}
    for module, callback in (
        ("transformers.models.auto.configuration_auto", _register_config),
        # The native classes (LlamaForCausalLM) never ask for the config by its model_type, but they look up the hook.
        ("transformers.quantizers.auto", _register_quantizer),
        ("diffusers.quantizers.auto", _register_diffusers_quantizer),
    ):
        if module in sys.modules:
            callback()
        else:
            waiting[module] = callback
    sys.meta_path.insert(0, AfterImport(waiting))
