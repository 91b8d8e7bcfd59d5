"""Which of the tools that formats are measured with can be had here."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path

LLAMA_CPP = "LLAMA_CPP"
"""Environment variable: a directory with llama.cpp's sources, for its converter; else the converter is on the path."""

CONVERTER = "convert_hf_to_gguf.py"

PACKAGES = {
    "transformers": ("transformers", ""),
    "PEFT": ("peft", "install peft"),
    "bitsandbytes": ("bitsandbytes", "install specdef-cli[deploy]"),
    "torchao": ("torchao", "install specdef-cli[deploy]"),
    "llama.cpp": ("llama_cpp", "install llama-cpp-python"),
    "lm-eval": ("lm_eval", "install specdef-cli[eval]"),
    "TRL": ("trl", "install trl"),
    "sentence-transformers": ("sentence_transformers", "install sentence-transformers"),
}
"""By the tool's name: the package to import, and what to do without it."""

PROGRAMS = {
    "llama.cpp": (CONVERTER, f"name the directory of llama.cpp's sources in the environment variable {LLAMA_CPP}"),
    "mergekit": ("mergekit-yaml", "install mergekit"),
}
"""By the tool's name: the program that is needed, and what to do without it."""


def missing(tool: str) -> str:
    """Why a tool cannot be had, as what to do about it; empty if it can."""
    if tool not in PACKAGES and tool not in PROGRAMS:
        return f"{tool} is not run from here"
    if tool in PACKAGES:
        package, remedy = PACKAGES[tool]
        # What a test blocks with None in sys.modules is missing, though find_spec would raise for it.
        blocked = package in sys.modules and sys.modules[package] is None
        if blocked or importlib.util.find_spec(package) is None:
            return remedy
    if tool in PROGRAMS:
        name, remedy = PROGRAMS[tool]
        if program(name) is None:
            return remedy
    return ""


def program(name: str) -> Path | None:
    """Where a program lies: in llama.cpp's directory where one is named, beside the interpreter, or on the path."""
    named = os.environ.get(LLAMA_CPP)
    # A virtual environment that is not activated is not on the path.
    for place in ([Path(named)] if named else []) + [Path(sys.executable).parent]:
        if (place / name).is_file():
            return place / name
    found = shutil.which(name)
    return None if found is None else Path(found)
