"""``python -m specdef_cli``, which ``accelerate launch -m specdef_cli`` needs; ``specdef`` is the same."""

import multiprocessing

from specdef_cli.cli import app
from specdef_cli.cli.startup import collect_less_garbage, quiet_engines


def main() -> None:
    """Run the command line in a process of its own."""
    collect_less_garbage()
    quiet_engines()
    app.main()


if multiprocessing.parent_process() is not None:  # a worker of --jobs imports this module before all that is heavy
    quiet_engines()

if __name__ == "__main__":
    main()
