"""Write the README's table of attacks between its markers: how far each gets on SmolLM2, from docs/tables."""

from __future__ import annotations

import re
from pathlib import Path

from pictures import TABLES, resistance_rows

README = Path(__file__).parents[2] / "README.md"
SHOWN = ("undone first, then full", "HiRA", "adapters", "embeddings alone", "LoRA on every linear", "full fine-tuning")
TITLES = {"fold": "`fold` (default)", "scale": "`scale`", "factors": "`factors` (the paper's)"}


def attack_table(text: str) -> str:
    """The attacks shown, the strongest first, with one share for each method, from a table of ``specdef compare``."""
    methods, rows = resistance_rows(text)
    lines = ["| attack | " + " | ".join(TITLES[method] for method in methods) + " |", "|---" * (len(methods) + 1) + "|"]
    for name, shares in rows:
        if name in SHOWN:
            cells = ("–" if share is None else f"{share * 100:.0f} %" for share in shares)
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def with_table(readme: str, table: str) -> str:
    """The README with this table between its markers."""
    place = re.compile(r"(<!-- table: make pictures -->\n).*?(<!-- end of table -->)", re.DOTALL)
    if not place.search(readme):
        raise ValueError("README.md has no markers for the table of make pictures")
    return place.sub(lambda found: f"{found[1]}{table}\n{found[2]}", readme)


if __name__ == "__main__":
    table = attack_table((TABLES / "attack-smollm2-135m-instruct.md").read_text(encoding="utf-8"))
    README.write_text(with_table(README.read_text(encoding="utf-8"), table), encoding="utf-8")
