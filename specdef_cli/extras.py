"""What is installed only where it is asked for: the extras of ``pyproject.toml``, and the modules that each one brings.

The core loads, hardens, inspects, collapses and publishes. Attacks, plots and real quantizers need more.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping

from specdef_cli.errors import SpecDefError

EXTRA_MODULES: Mapping[str, tuple[str, ...]] = {
    "attack": ("datasets", "peft", "PIL", "pytorch_optimizer"),
    "deploy": ("bitsandbytes", "torchao"),
    "diffusion": ("diffusers",),
    "eval": ("lm_eval",),
    "report": ("jinja2", "matplotlib"),
}
"""Names as they are imported, by extra."""

INSTALLATION = "`pip install .` in a clone of the specdef repository"
"""How a reader gets this package, in the words of a model card: it is on no package index."""


class MissingExtraError(SpecDefError, ImportError):
    """Something that is asked for needs an extra that is not installed."""

    def __init__(self, purpose: str, extra: str) -> None:
        missing = missing_modules(extra) or EXTRA_MODULES[extra]
        verb = "is" if len(missing) == 1 else "are"
        super().__init__(
            f"{purpose} need {', '.join(missing)}, which {verb} not installed", f"pip install 'specdef-cli[{extra}]'"
        )
        self.arguments = (purpose, extra)

    def __reduce__(self) -> tuple[type[MissingExtraError], tuple[str, str]]:
        return type(self), self.arguments


def missing_modules(extra: str) -> tuple[str, ...]:
    """The modules of an extra that cannot be imported here; none of them is imported to find out."""
    return tuple(name for name in EXTRA_MODULES[extra] if importlib.util.find_spec(name) is None)


def require_extra(extra: str, purpose: str) -> None:
    """Refuse work that needs an extra, before any of it is done.

    Raises:
        MissingExtraError: A module of the extra is not installed.
    """
    if missing_modules(extra):
        raise MissingExtraError(purpose, extra)
