"""The page ``reference/commands.md``, written by Typer from the commands themselves whenever the pages are built."""

from __future__ import annotations

import html
import re
import subprocess
import sys

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

PAGE = "reference/commands.md"
EXAMPLES = re.compile(r"(?:^ *specdef .*\n\n)+", re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the page to those that are built."""
    files.append(File.generated(config, PAGE, content=commands_page()))
    return files


def commands_page() -> str:
    """Every command with its options, in Markdown."""
    typer = [sys.executable, "-m", "typer", "specdef_cli.cli.app", "utils", "docs", "--name", "specdef"]
    written = subprocess.run(typer, capture_output=True, text=True, check=True).stdout
    # Typer escapes for HTML what Markdown leaves as it is.
    return EXAMPLES.sub(_as_block, html.unescape(written)).replace("# `specdef`", "# Commands", 1)


def _as_block(examples: re.Match[str]) -> str:
    lines = re.sub(r"^ *", "$ ", "\n".join(examples[0].split("\n\n")).strip(), flags=re.MULTILINE)
    return f"```console\n{lines}\n```\n\n"
