"""What users are told of another library's exception."""

from __future__ import annotations

import pytest

from specdef_cli.errors import first_line


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("  no such key  \nTraceback …"), "no such key"),
        (RuntimeError("\n \n  second line\nthird"), "second line"),
        (KeyError("name"), "'name'"),
        (OSError(), "OSError"),
        (ValueError(" \n"), "ValueError"),
        (OSError("401 for https://user:secretword@host/x"), "401 for https://***@host/x"),
        (OSError("Bearer hf_abcdefghijklmnop was refused"), "Bearer *** was refused"),
    ],
)
def test_the_first_line_with_text_without_tokens(error: Exception, line: str) -> None:
    assert first_line(error) == line
