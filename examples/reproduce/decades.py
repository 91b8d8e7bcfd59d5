"""From a short search to a long attack: of every training, the best decade of the model and of its control, ± one.

    python examples/reproduce/decades.py report.json >long.toml

The rates of the short search are the longer attack's start; a best rate at the edge of its three decades shows in the
report's notes.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from specdef_cli.report.document import read_report


def decades(rate: float) -> set[float]:
    """The decade of a rate, and its neighbours."""
    exponent = round(math.log10(rate))
    return {float(f"1e{each}") for each in (exponent - 1, exponent, exponent + 1)}


def main() -> None:
    """Print the suite."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("report", type=Path)
    rates: dict[str, set[float]] = {}
    names: dict[str, str] = {}
    for attack in read_report(parser.parse_args().report).attacks:
        if attack.variant == "plain" and attack.edit is None:
            rates.setdefault(attack.training, set()).update(decades(attack.learning_rate))
            names[attack.training] = attack.trained
    for training, found in rates.items():
        listed = ", ".join(f"{rate:g}" for rate in sorted(found, reverse=True))
        print(f'[[attacks]]\ntrainings = [{{ training = "{training}", name = "{names[training]}" }}]')
        print(f"learning_rates = [{listed}]\n")


if __name__ == "__main__":
    main()
