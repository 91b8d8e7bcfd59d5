"""The page ``reference/commands.md``, written by Typer from the commands themselves whenever the pages are built."""

from __future__ import annotations

import html
import subprocess
import sys

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

PAGE = "reference/commands.md"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the page to those that are built."""
    files.append(File.generated(config, PAGE, content=commands_page()))
    return files


def commands_page() -> str:
    """Every command with its options, in Markdown."""
    typer = [sys.executable, "-m", "typer", "specdef_cli.cli.app", "utils", "docs", "--name", "specdef"]
    written = subprocess.run(typer, capture_output=True, text=True, check=True).stdout
    # Typer escapes for HTML what Markdown leaves as it is.
    return html.unescape(written).replace("# `specdef`", "# Commands", 1)
