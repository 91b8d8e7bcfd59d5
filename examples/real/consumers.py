"""What of a checkpoint's life after release still works after hardening, tool by tool, as one Markdown table.

    python examples/real/consumers.py HARDENED [HARDENED …] --base BASE [--rows nf4,q8_0]

Every cell (a checkpoint, a row) runs in a process of its own, since a tool may crash, and is kept under ``--cells`` by
a key of the weights, the row, the text and the tool's release: a run that was cut off goes on where it was. ``--jobs``
cells run at a time, those of one checkpoint and one tool one after the other, which share its files.
With ``--minutes`` no cell is started later than that, and missing ones say so; ``--minutes 0`` prints what is there.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import math
import multiprocessing
import os
import pydoc_data.topics
import resource
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from consumer_rows import ROWS as FORMATS
from consumer_rows import missing
from filelock import FileLock, Timeout

from specdef_cli.certify.formats import FormatFigure, Outcome, compare, measure_format
from specdef_cli.certify.tools import Trial
from specdef_cli.checkpoint.files import write_durably
from specdef_cli.checkpoint.manifest import read_manifest
from specdef_cli.checkpoint.reader import read_config
from specdef_cli.hardening.card import lost_formats
from specdef_cli.model import load_tokenizer
from specdef_cli.model.inputs import token_batch
from specdef_cli.model.opened import open_model
from specdef_cli.model.skeleton import is_causal_lm
from specdef_cli.process import quiet_engines

ROWS = (
    *("float32", "bfloat16", "float16", "static-cache", "long-input", "left-padded"),
    *("llm-int8", "nf4", "fp4", "nf4-double"),
    *("torchao-float8", "torchao-int8", "torchao-int4", "torchao-int4-packed"),
    *("gguf-f32", "gguf-f32/no-flash", "gguf-f32/f32-cache", "gguf-f32/f32-cache/no-flash", "gguf-bf16"),
    *("gguf-f16", "gguf-f16/converter", "q8_0", "q8_0/converter", "q4_0", "q4_k_m"),
    *("lora", "lora-merged", "lora-round-trip", "sft", "lm-eval", "merge"),
)
"""Rows of a language model's table."""

ENCODER_ROWS = (
    *("float32", "bfloat16", "float16", "llm-int8", "nf4", "torchao-float8", "torchao-int8"),
    *("lora", "lora-merged", "embeddings"),
)
"""Rows of an encoder's table."""

DISTRIBUTIONS = {"PEFT": "peft", "TRL": "trl", "lm-eval": "lm_eval", "llama.cpp": "llama-cpp-python"}
"""By the tool's name: the package whose release a cell depends on, where that has another name."""

SECONDS = 1_200
"""A cell that takes longer is stopped."""

UNFINISHED = "not measured yet (the time was up)"


@dataclass(frozen=True)
class Bench:
    """Where and until when cells are measured.

    Attributes:
        cells: The directory of finished cells.
        last_start: No cell is started later than this, in seconds of ``time.monotonic``.
    """

    cells: Path
    last_start: float


def main() -> None:
    """Measure what is not yet measured, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("hardened", type=Path, nargs="*", help="hardened directories; a column each")
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--rows", default="", help="names of formats, with commas between them")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time")
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no cell later than this")
    parser.add_argument("--cells", type=Path, default=Path("models/cells"), help="where finished cells are kept")
    parser.add_argument("--out", type=Path, help="a file for the table, besides the output")
    arguments = parser.parse_args()
    causal = is_causal_lm(read_config(arguments.base))
    rows = wanted_rows(arguments.rows, ROWS if causal else ENCODER_ROWS)
    tokens = evaluation_tokens(arguments.base, arguments.sequences, arguments.length) if causal else None
    # Of the processes that measure, and of the tools' own.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // arguments.jobs)))
    bench = Bench(arguments.cells, time.monotonic() + 60 * arguments.minutes)
    directories = (arguments.base, *arguments.hardened)
    chains = [
        (directory, tuple(name for name in rows if FORMATS[name].tool == tool))
        for directory in directories
        for tool in dict.fromkeys(FORMATS[name].tool for name in rows)
    ]
    columns: dict[Path, dict[str, Outcome]] = {directory: {} for directory in directories}
    with alone(arguments.cells), ThreadPoolExecutor(arguments.jobs) as pool:
        running = [pool.submit(outcomes, bench, chain, arguments.base, tokens) for chain in chains]
        for (directory, _), found in zip(chains, running, strict=True):
            columns[directory] |= found.result()
    ordered = {directory: {name: found[name] for name in rows} for directory, found in columns.items()}
    table = markdown(arguments.base, ordered, tokens)
    print(table)
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        write_durably(arguments.out, table + "\n")


def wanted_rows(names: str, usual: Sequence[str]) -> Sequence[str]:
    """The rows that are named, else the usual ones."""
    found = [name for name in names.split(",") if name]
    for name in found:
        if name not in FORMATS:
            sys.exit(f"error: there is no format {name!r}\nChoose from {', '.join(FORMATS)}.")
    return found or usual


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


def outcomes(
    bench: Bench, chain: tuple[Path, Sequence[str]], base: Path, tokens: torch.Tensor | None
) -> dict[str, Outcome]:
    """The rows of one checkpoint and one tool, one after the other."""
    directory, rows = chain
    with scratch_directory(bench.cells, directory, rows[0]) as scratch:
        trial = Trial(open_model(directory), open_model(base), scratch, tokens)
        return {name: outcome(trial, name, bench) for name in rows}


@contextmanager
def alone(cells: Path) -> Iterator[None]:
    """Hold the directory of cells: a second run would remove the files that the first one converts."""
    cells.mkdir(parents=True, exist_ok=True)
    lock = FileLock(cells / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        sys.exit(f"error: another run measures in {cells}\nWait for it to finish, or give another --cells.")
    try:
        yield
    finally:
        lock.release()


@contextmanager
def scratch_directory(cells: Path, directory: Path, first: str) -> Iterator[Path]:
    """A place for a checkpoint's converted files while the rows of one tool are measured."""
    tool = "".join(letter for letter in FORMATS[first].tool if letter.isalnum())
    scratch = cells / "scratch" / f"{open_model(directory).fingerprint}-{tool}"
    shutil.rmtree(scratch, ignore_errors=True)  # what a run that was killed has left
    scratch.mkdir(parents=True)
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch)


def outcome(trial: Trial, name: str, bench: Bench) -> Outcome:
    """A cell: the one that is kept, or measured in a process of its own unless it is too late for that."""
    path = bench.cells / f"{key(trial, name)}.json"
    if not path.is_file():
        if time.monotonic() >= bench.last_start:
            return Outcome("skipped", note=UNFINISHED)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["specdef_cli.certify.formats"])
        process = context.Process(target=measured, args=(trial, name, path))
        process.start()
        process.join(SECONDS)
        if process.is_alive():
            process.kill()
            process.join()
            return Outcome("skipped", note=f"stopped after {SECONDS} s")
        if not path.is_file():
            code = process.exitcode or 0
            how = f"crashed (signal {-code})" if code < 0 else "failed"
            # Not kept: memory may have been short, and the next run finds out.
            return Outcome("refused", note=f"the process {how}")
    return Outcome(**json.loads(path.read_text(encoding="utf-8")))


def measured(trial: Trial, name: str, path: Path) -> None:
    """Measure a cell, and keep it."""
    quiet_engines()
    found = measure_format(trial, FORMATS[name])
    write_durably(path, json.dumps(asdict(found)))
    usages = [resource.getrusage(whose) for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    seconds = sum(usage.ru_utime + usage.ru_stime for usage in usages)
    print(f"{trial.directory.name} {name}: {found}, {seconds:.0f} s of CPU", file=sys.stderr, flush=True)


def key(trial: Trial, name: str) -> str:
    """What a cell depends on."""
    tool = FORMATS[name].tool
    packages = ("torch", "transformers", DISTRIBUTIONS.get(tool, tool))
    releases = [f"{package} {_release(package)}" for package in packages]
    texts = "" if trial.tokens is None else hashlib.sha256(trial.tokens.numpy().tobytes()).hexdigest()
    parts = [trial.model.fingerprint, name, texts, missing(tool), *releases]
    parts.append(trial.base.fingerprint)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def _release(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def markdown(base: Path, columns: dict[Path, dict[str, Outcome]], tokens: torch.Tensor | None) -> str:
    """The table: the base's loss, then what became of each hardened checkpoint; refusals and skips in words below."""
    of_base, *others = columns.values()
    hardened = {directory.name.removeprefix(f"{base.name}-"): directory for directory in list(columns)[1:]}
    measure = "relative error" if tokens is None else "loss"
    what = "relative error of the outputs" if tokens is None else f"nats a token, {tokens.numel():,} tokens"
    lines = [f"| tool | what | base | {' | '.join(hardened)} |", "|---|---|---|" + "---|" * len(hardened)]
    remarks: dict[str, list[str]] = {}
    for name in of_base:
        row = FORMATS[name]
        figures = [compare(name, row.tool, measure, of_base[name], found[name]) for found in others]  # type: ignore[arg-type]
        where = f"{row.tool}, {row.description}"
        value = of_base[name].value
        if value is None:
            remarks.setdefault(of_base[name].note or "the base itself is not finite", []).append(f"{where}, base")
            continue
        shown = f"{value:.3f}"
        lines.append(f"| {row.tool} | {row.description} | {shown} | {' | '.join(map(cell, figures))} |")
        for column, figure in zip(hardened, figures, strict=True):
            if figure.status in {"refused", "skipped"}:
                remarks.setdefault(figure.note, []).append(f"{where}, {column}")
    notes = [f"- {'; '.join(rows)}: {remark}" for remark, rows in remarks.items()]
    said = [f"- {name}: {'; '.join(lost(directory)) or 'nothing'}" for name, directory in hardened.items()]
    return "\n".join(
        [
            f"{base.name}: {what}.",
            *("", *lines),
            *("", "What `harden` says that each does not survive:", "", *said),
            *(("", "Refused, or not measured:", "", *notes) if notes else ()),
        ]
    )


def lost(directory: Path) -> tuple[str, ...]:
    """The formats that ``harden`` names before it works, and the card."""
    manifest = read_manifest(directory)
    return lost_formats(manifest.folded, manifest.profile, with_code=bool(manifest.factored or manifest.scaled))


def cell(figure: FormatFigure) -> str:
    """A verdict with its figure."""
    if figure.status in {"refused", "skipped"}:
        return figure.verdict
    return f"{figure.verdict}: {'not finite' if figure.hardened is None else f'{figure.hardened:.3f}'}"


if __name__ == "__main__":
    main()
