"""The files of a checkpoint that are not its weights: tokenizer, generation config, code, licence, further modules.

Every file of an input is hardened, carried over, or named as left out. Carried over is what is known to hold no weights
of the model as it was; anything else could publish them beside the hardened ones.
"""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath

from specdef_cli.checkpoint.headers import read_headers
from specdef_cli.checkpoint.links import require_inside
from specdef_cli.checkpoint.manifest import MANIFEST_NAME
from specdef_cli.checkpoint.weight_formats import OTHER_FORMATS, PICKLES, SAFETENSORS, is_no_weights
from specdef_cli.errors import SpecDefError

# Written anew for every output.
REWRITTEN = frozenset({"config.json", "README.md", MANIFEST_NAME, "certificate.json"})
SHOWN = 8
"""How many files that are left out a note names one by one."""


@dataclass(frozen=True)
class Companions:
    """What becomes of the files beside the weights; paths relative to the directory."""

    carried: tuple[Path, ...]
    left_out: Mapping[str, tuple[Path, ...]]

    def note(self) -> str | None:
        """One line that names what is left out; ``None`` where nothing is."""
        parts = []
        for reason, paths in self.left_out.items():
            names = [path.as_posix() for path in paths[:SHOWN]]
            more = [f"{len(paths) - SHOWN} more"] * (len(paths) > SHOWN)
            parts.append(f"{', '.join(names + more)} ({reason})")
        return f"Not carried over: {'; '.join(parts)}." if parts else None


def companions(directory: Path, weights: Collection[str], shapes: Mapping[str, tuple[int, ...]]) -> Companions:
    """Divide the files of a checkpoint directory into those to carry over and those to leave out.

    Args:
        shapes: Shapes of the tensors in them, by name.
    """
    carried: list[Path] = []
    left_out: dict[str, list[Path]] = {}
    for relative in _entries(directory):
        if relative.as_posix() in weights or relative.as_posix() in REWRITTEN:
            continue
        reason = _reason(directory, relative, shapes)
        if reason is None:
            carried.append(relative)
        else:
            left_out.setdefault(reason, []).append(relative)
    return Companions(tuple(carried), {reason: tuple(paths) for reason, paths in left_out.items()})


def companion_files(directory: Path) -> tuple[Path, ...]:
    """Files that may be carried over, whatever the weights are, relative to ``directory``."""
    return tuple(path for path in _entries(directory) if _by_name(directory, path) is None)


def carry_over(source: Path, target: Path, files: Collection[Path]) -> None:
    """Copy companion files of ``source`` to ``target``; ``open_checkpoint`` has refused stray links already."""
    for relative in files:
        require_inside(source, source / relative)
        destination = target / relative
        destination.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / relative, destination)


def _entries(directory: Path) -> list[Path]:
    """Everything in a directory that is not a directory; a hidden one counts as one entry, a link to one too."""
    found: list[Path] = []
    waiting = [directory]
    while waiting:
        for path in waiting.pop().iterdir():
            if path.is_dir() and not path.is_symlink() and not _hidden(path):
                waiting.append(path)
            else:
                found.append(path.relative_to(directory))
    return sorted(found)


def _hidden(path: PurePath) -> bool:
    return path.name.startswith(".") or path.name == "__pycache__"


def _by_name(directory: Path, relative: Path) -> str | None:
    """Why a file is left out, as far as its name and kind tell; ``None`` if it may be carried over."""
    path = directory / relative
    suffix = path.name.removesuffix(".index.json") if path.name.endswith(".index.json") else path.name
    suffix = PurePath(suffix).suffix.lower()
    if _hidden(relative):
        return "hidden"
    if not path.is_file():
        return "a link to a directory" if path.is_dir() else "no file"
    if suffix in PICKLES:
        return "pickles are neither read nor copied"
    if suffix in OTHER_FORMATS:
        return "weights in another format, of the model as it was"
    if suffix != SAFETENSORS and not is_no_weights(path):
        return "a binary file that may hold weights of the model as it was"
    return None


def _reason(directory: Path, relative: Path, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    reason = _by_name(directory, relative)
    if reason is not None:
        return reason
    folder = (directory / relative).parent
    if (folder / "adapter_config.json").is_file() and relative.stem.startswith("adapter_"):
        return "an adapter that was trained for the model as it was"
    if relative.name.endswith(f"{SAFETENSORS}.index.json"):
        members = [path for path in folder.glob(f"*{SAFETENSORS}") if path != directory / relative]
        belongs_here = relative.parent != Path() and any(not _is_copy(path, shapes) for path in members)
        return None if belongs_here else "it names weights of the model as it was"
    if relative.suffix == SAFETENSORS and _is_copy(directory / relative, shapes):
        return "weights of the model as it was, which are not loaded"
    return None


def _is_copy(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether a safetensors file holds tensors of the model once more: the same names, or much of the same shapes."""
    with contextlib.suppress(SpecDefError):  # a damaged file is carried over as it is
        headers = read_headers(path)
        if any(shapes.get(name) == header.shape for name, header in headers.items()):
            return True
        of_the_model = set(shapes.values())
        alike = sum(math.prod(header.shape) for header in headers.values() if header.shape in of_the_model)
        return 2 * alike > sum(map(math.prod, shapes.values()))
    return False
