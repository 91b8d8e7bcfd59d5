"""Write the README's table of attacks and docs/tables/resistance.md, from docs/tables/attack-*.md.

Nothing is measured here: ``make real-attack`` does that.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from pictures import TABLES, resistance_rows

README = Path(__file__).parents[2] / "README.md"
README_ATTACKS = (
    "undone first, full fine-tuning", "HiRA", "adapters", "embeddings alone", "LoRA on every linear",
    "full fine-tuning",
)  # fmt: skip
README_METHODS = {"fold": "`fold` (default)", "scale": "`scale`", "factors": "`factors` (the paper's)"}
MODELS = {
    "smollm2-135m-instruct": "SmolLM2-135M-Instruct",
    "gemma-3-270m": "Gemma-3-270m",
    "deep-60": "60 layers",
    "tiny-llama": "the tiny Llama",
}


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def readme_table(text: str) -> str:
    """A few attacks, the strongest first, with one share for each method, from a table of ``specdef compare``."""
    methods, rows = resistance_rows(text)
    shown = [[name, *(cell or "–" for cell in cells)] for name, cells in rows if name in README_ATTACKS]
    return table(["attack", *(README_METHODS[method] for method in methods)], shown)


def method_table(texts: Mapping[str, str], method: str) -> str:
    """What each attack gets of one method, with one share for each model; the first model orders the attacks."""
    shares: dict[str, list[str]] = {}
    for place, text in enumerate(texts.values()):
        methods, rows = resistance_rows(text)
        for name, cells in rows:
            cell = cells[methods.index(method)]
            if cell is not None:
                shares.setdefault(name, ["–"] * len(texts))[place] = cell
    return table([f"`{method}`", *texts], [[name, *cells] for name, cells in shares.items()])


def summary(texts: Mapping[str, str]) -> str:
    """The page docs/tables/resistance.md, from the tables of all models."""
    note = "?: the rates tried do not bracket the best one. –: not tried, or not reached in the time."
    return "\n\n".join([method_table(texts, "fold"), method_table(texts, "scale"), note]) + "\n"


def with_table(readme: str, table: str) -> str:
    """The README with this table between its markers."""
    place = re.compile(r"(<!-- table: make pictures -->\n).*?(<!-- end of table -->)", re.DOTALL)
    if not place.search(readme):
        raise ValueError("README.md has no markers for the table of make pictures")
    return place.sub(lambda found: f"{found[1]}{table}\n{found[2]}", readme)


def written() -> dict[Path, str]:
    """The files that this script writes, from the tables of this checkout."""
    texts = {name: (TABLES / f"attack-{stem}.md").read_text(encoding="utf-8") for stem, name in MODELS.items()}
    readme = with_table(README.read_text(encoding="utf-8"), readme_table(texts["SmolLM2-135M-Instruct"]))
    return {README: readme, TABLES / "resistance.md": summary(texts)}


if __name__ == "__main__":
    for path, text in written().items():
        path.write_text(text, encoding="utf-8")
