"""What other libraries log when they are imported, which no user of the command can act on.

Nothing here imports a library: it has to run before they are imported.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pkgutil import resolve_name
from typing import Any

LOUD = ("SPECDEF_DEBUG", "SPECDEF_VERBOSE")
"""Environment variables that let everything through, in the workers of ``--jobs`` too."""

NOISY = ("torchao", "torch.utils._pytree", "bitsandbytes")
"""They warn of kernels for other machines, of each other's interfaces, and of every cast."""


def quiet_engines(environ: Mapping[str, str] = os.environ) -> None:
    """Let the libraries that a command imports log errors alone; transformers' and the user's own warnings stay."""
    if not any(environ.get(name) for name in LOUD):
        for name in NOISY:
            logging.getLogger(name).setLevel(logging.ERROR)


def start_worker(function: str, *arguments: Any) -> None:
    """Run ``package.module:name`` in a new process that has been made quiet; its module is imported only then."""
    quiet_engines()
    resolve_name(function)(*arguments)
