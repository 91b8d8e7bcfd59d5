"""``python -m specdef_cli``, which ``accelerate launch -m specdef_cli`` needs; ``specdef`` is the same."""

import os
import sys

from specdef_cli.cli import app
from specdef_cli.process import LOUD, collect_less_garbage, quiet_engines


def main() -> None:
    """Run the command line in a process of its own."""
    collect_less_garbage()
    if "--verbose" in sys.argv:
        os.environ[LOUD] = "1"
    quiet_engines()
    app.main()


if __name__ == "__main__":
    main()
