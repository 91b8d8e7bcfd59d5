"""``python -m specdef_cli``, which ``accelerate launch -m specdef_cli`` needs; ``specdef`` is the same."""

from specdef_cli.cli.app import main

if __name__ == "__main__":
    main()
