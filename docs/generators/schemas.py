"""The page ``reference/schemas.md``: the JSON Schemas of the files that specdef writes, as the package ships them."""

from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

PAGE = "reference/schemas.md"
MODULES = "python.md#specdef_cli."
REPORT_SCHEMA = Path(__file__).parents[2] / "specdef_cli/report/schema.json"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the page to those that are built."""
    files.append(File.generated(config, PAGE, content=schemas_page()))
    return files


def schemas_page() -> str:
    """The schemas, each in a block of its own."""
    return "\n".join(
        (
            "# Files",
            "",
            "| file | written by | what it is |",
            "|---|---|---|",
            f"| `specdef.json` | `harden` | the manifest: [`Manifest`]({MODULES}checkpoint.manifest.Manifest) |",
            "| `report.json` | `attack` | every run and every finding: the schema below |",
            "| `curves.csv` | `attack` | one row for each evaluation of each run |",
            "| `certificate.json` | `certify` | claims, figures, hashes: "
            f"[`Certificate`]({MODULES}certify.certificate.Certificate) |",
            "",
            "## report.json",
            "",
            '??? note "JSON Schema (`specdef_cli/report/schema.json`)"',
            "",
            "    ```json",
            *(f"    {line}" for line in REPORT_SCHEMA.read_text(encoding="utf-8").splitlines()),
            "    ```",
            "",
        )
    )
