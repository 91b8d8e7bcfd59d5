"""The page ``reference/python.md``: what mkdocstrings leaves out of classes of options, and roles that it leaves in."""

from __future__ import annotations

import dataclasses
import importlib
import re
from typing import Any

from mkdocs.structure.pages import Page

from specdef_cli.option import flag_of, options_of

PAGE = "reference/python.md"
DOCUMENTED = re.compile(r"^::: ([\w.]+)\.(\w+)$", re.MULTILINE)
ROLE = re.compile(r":(?:func|class|data|mod|meth|attr):(?=<code>)")


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Set a table of fields below every class of options: their help is in no docstring."""
    if page.file.src_uri != PAGE:
        return markdown
    return DOCUMENTED.sub(lambda found: f"{found[0]}\n{fields_table(found[1], found[2])}", markdown)


def on_page_content(html: str, page: Page, **_: Any) -> str:
    """Leave the names of Sphinx's roles out: ``:func:`` and the like."""
    return ROLE.sub("", html) if page.file.src_uri == PAGE else html


def fields_table(module: str, name: str) -> str:
    """The fields of a class that the command line takes too, in Markdown; nothing where there are none."""
    model: Any = getattr(importlib.import_module(module), name)
    fields = options_of(model) if isinstance(model, type) and dataclasses.is_dataclass(model) else {}
    if not fields:
        return ""
    lines = ["", "| field | default | what it is | on the command line |", "|---|---|---|---|"]
    for field in fields.values():
        shown = field.metadata["shown_default"] or field.default
        words = field.metadata["description"].replace("|", "\\|")
        lines.append(f"| `{field.name}` | {shown} | {words} | `{flag_of(model, field.name)}` |")
    return "\n".join(lines) + "\n"
