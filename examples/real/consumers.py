"""What of a checkpoint's life after release still works after hardening, tool by tool, as one Markdown table.

    python examples/real/consumers.py HARDENED [HARDENED …] --base BASE [--rows nf4,q8_0 | --group bitsandbytes]

Every cell (a checkpoint, a row) runs in a process of its own, since a tool may crash, and is kept under ``--cells`` by
a key of the weights, the row, the text and the tools' releases: a run that was cut off goes on where it was.
With ``--minutes`` no cell is started later than that, and missing ones say so; ``--minutes 0`` prints what is there.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import math
import multiprocessing
import pydoc_data.topics
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch

from specdef_cli.attack.spec import checkpoint_fingerprint
from specdef_cli.certify.deployment import (
    FORMATS,
    DeploymentFigure,
    Outcome,
    Trial,
    compare,
    measure_format,
    token_batch,
)
from specdef_cli.certify.deployment.measure import is_causal
from specdef_cli.certify.deployment.tools import missing
from specdef_cli.checkpoint.stream import write_durably
from specdef_cli.cli.startup import quiet_engines
from specdef_cli.runtime import load_tokenizer

PACKAGES = (
    "torch",
    "transformers",
    "bitsandbytes",
    "torchao",
    "gguf",
    "peft",
    "trl",
    "lm_eval",
    "sentence-transformers",
)
SECONDS = 900
"""A cell that takes longer is stopped."""

UNFINISHED = "not measured yet (the time was up)"


def main() -> None:
    """Measure what is not yet measured, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("hardened", type=Path, nargs="*", help="hardened directories; a column each")
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--rows", default="", help="names of formats, with commas between them; all by default")
    parser.add_argument("--group", default="", help="tools whose rows are wanted, with commas between them")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no cell later than this")
    parser.add_argument("--cells", type=Path, default=Path("models/cells"), help="where finished cells are kept")
    parser.add_argument("--out", type=Path, help="a file for the table, besides the output")
    arguments = parser.parse_args()
    groups = [name for name in arguments.group.split(",") if name]
    rows = [name for name in arguments.rows.split(",") if name] or [
        name for name, row in FORMATS.items() if not groups or row.tool in groups
    ]
    unknown = [name for name in rows if name not in FORMATS]
    if unknown:
        sys.exit(f"error: there is no format {unknown[0]!r}; choose from {', '.join(FORMATS)}")
    tokens = None
    if is_causal(arguments.base):
        tokens = evaluation_tokens(arguments.base, arguments.sequences, arguments.length)
    last_start = time.monotonic() + 60 * arguments.minutes
    columns: dict[str, dict[str, Outcome]] = {}
    for directory in (arguments.base, *arguments.hardened):
        with gguf_files(arguments.cells, directory) as scratch:
            trial = Trial(directory, arguments.base, scratch, tokens)
            columns[str(directory)] = {name: outcome(trial, name, arguments.cells, last_start) for name in rows}
    table = markdown(arguments.base, columns, "relative error" if tokens is None else "loss", tokens)
    print(table)
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        write_durably(arguments.out, table + "\n")


def evaluation_tokens(base: Path, sequences: int, length: int) -> torch.Tensor:
    """English prose that every Python has (the help topics), and the same as a chat where the model has a template."""
    topics = {name: " ".join(text.split("\n")).strip() for name, text in sorted(pydoc_data.topics.topics.items())}
    prose = "\n\n".join(topics.values())[5_000:]
    tokenizer = load_tokenizer(base)
    if not tokenizer.chat_template:
        return token_batch(base, prose, sequences=sequences, length=length)
    turns = [
        [
            {"role": "user", "content": f"What does Python's help say about {name}?"},
            {"role": "assistant", "content": text},
        ]
        for name, text in topics.items()
        if len(text) < 1_500
    ]
    chats = "".join(tokenizer.apply_chat_template(chat, tokenize=False) for chat in turns)
    half = sequences // 2
    return torch.cat(
        [
            token_batch(base, prose, sequences=sequences - half, length=length),
            token_batch(base, chats, sequences=half, length=length),
        ]
    )


@contextmanager
def gguf_files(cells: Path, directory: Path) -> Iterator[Path]:
    """A place for a checkpoint's converted files while its rows are measured."""
    scratch = cells / "scratch" / checkpoint_fingerprint(directory)
    scratch.mkdir(parents=True, exist_ok=True)
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch)


def outcome(trial: Trial, name: str, cells: Path, last_start: float) -> Outcome:
    """A cell: the one that is kept, or measured in a process of its own unless it is later than ``last_start``."""
    path = cells / f"{key(trial, name)}.json"
    if not path.is_file():
        start = time.monotonic()
        if start >= last_start:
            return Outcome("skipped", note=UNFINISHED)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["specdef_cli.certify.deployment"])
        process = context.Process(target=measured, args=(trial, name, path))
        process.start()
        process.join(SECONDS)
        if process.is_alive():
            process.kill()
            process.join()
            return Outcome("skipped", note=f"stopped after {SECONDS} s")
        if not path.is_file():
            how = f"crashed (signal {-process.exitcode})" if (process.exitcode or 0) < 0 else "failed"
            # Not kept: memory may have been short, and the next run finds out.
            return Outcome("refused", note=f"the process {how}")
        print(f"{trial.directory.name} {name}: {path.read_text()} {time.monotonic() - start:.0f} s", file=sys.stderr)
    return Outcome(**json.loads(path.read_text(encoding="utf-8")))


def measured(trial: Trial, name: str, path: Path) -> None:
    """Measure a cell, and keep it."""
    quiet_engines()
    found = measure_format(trial, name)
    write_durably(path, json.dumps(asdict(found)))


def key(trial: Trial, name: str) -> str:
    """What a cell depends on."""
    releases = [f"{package} {_release(package)}" for package in PACKAGES]
    texts = "" if trial.tokens is None else hashlib.sha256(trial.tokens.numpy().tobytes()).hexdigest()
    parts = [checkpoint_fingerprint(trial.directory), name, texts, missing(FORMATS[name].tool), *releases]
    parts.append(checkpoint_fingerprint(trial.base))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def _release(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def markdown(base: Path, columns: dict[str, dict[str, Outcome]], measure: str, tokens: torch.Tensor | None) -> str:
    """The table: the base's loss, then what became of each hardened checkpoint; refusals and skips in words below."""
    of_base, *others = columns.values()
    names = [Path(name).name.removeprefix(f"{base.name}-") for name in list(columns)[1:]]
    what = "relative error of the outputs" if tokens is None else f"nats a token, {tokens.numel():,} tokens"
    lines = [f"| tool | what | {base.name} | {' | '.join(names)} |", "|---|---|---|" + "---|" * len(names)]
    remarks: dict[str, list[str]] = {}
    for name in of_base:
        row = FORMATS[name]
        figures = [compare(name, row.tool, measure, of_base[name], each[name]) for each in others]  # type: ignore[arg-type]
        where = f"{row.tool}, {row.description}"
        value = of_base[name].value
        if value is None:
            remarks.setdefault(of_base[name].note or "the base itself is not finite", []).append(where)
            continue
        shown = f"{value:.3f}{' (simulated)' if of_base[name].simulated else ''}"
        lines.append(f"| {row.tool} | {row.description} | {shown} | {' | '.join(map(cell, figures))} |")
        for column, figure in zip(names, figures, strict=True):
            if figure.status in {"refused", "skipped"}:
                remarks.setdefault(figure.note, []).append(f"{where}, {column}")
    notes = [f"- {'; '.join(rows)}: {remark}" for remark, rows in remarks.items()]
    return "\n".join(
        [f"{base.name}: {what}.", "", *lines, *(["", "Refused, or not measured:", ""] if notes else []), *notes]
    )


def cell(figure: DeploymentFigure) -> str:
    """A verdict with its figure."""
    if figure.status in {"refused", "skipped"}:
        return figure.verdict
    return f"{figure.verdict}: {'not finite' if figure.hardened is None else f'{figure.hardened:.3f}'}"


if __name__ == "__main__":
    main()
