"""The ``specdef`` command: its subcommands, and how their failures reach the user."""

from __future__ import annotations

import errno
import inspect
import os
import sys
import traceback
from collections.abc import Callable
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from specdef_cli import __version__
from specdef_cli.cli.attack import attack_command, compare_command
from specdef_cli.cli.certify import certify_command, verify_certificate_command
from specdef_cli.cli.harden import collapse_command, convert_adapter_command, harden_command, push_command
from specdef_cli.cli.inspect import inspect_command
from specdef_cli.cli.options import GroupedCommand
from specdef_cli.cli.output import safe_streams
from specdef_cli.errors import SpecDefError, WrongUsage, first_line, is_out_of_memory, printable
from specdef_cli.process import require_surroundings

INTERRUPTED = 130  # 128 + SIGINT, as shells have it
WRONG_PATH = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL}
"""What the system says of a path that a user has mistyped."""

app = typer.Typer(
    name="specdef",
    help="Harden open-weight checkpoints against fine-tuning without changing what they compute, and measure "
    "honestly how far that holds.",
    no_args_is_help=True,
    rich_markup_mode=None,  # whole flags in 80 columns: rich cuts the long ones
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
COMMANDS: dict[str, Callable[..., None]] = {
    "harden": harden_command,
    "attack": attack_command,
    "certify": certify_command,
    "collapse": collapse_command,
    "compare": compare_command,
    "inspect": inspect_command,
    "convert-adapter": convert_adapter_command,
    "push": push_command,
    "verify-certificate": verify_certificate_command,
}
for name, command in COMMANDS.items():
    # By itself, the list of commands would cut the sentence to the width that is left.
    sentence = (inspect.getdoc(command) or "").partition("\n\n")[0]
    app.command(name, short_help=sentence, cls=GroupedCommand)(command)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"specdef {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Exit codes: 0 done, 1 failed, 2 wrong usage. A command's --verbose, or SPECDEF_DEBUG=1, shows the traceback."""


def main() -> None:
    """Run the command line. Failures that the user can do something about are two lines on stderr and exit code 1."""
    with safe_streams():
        try:
            require_surroundings()
            app()
        except (SpecDefError, OSError) as error:
            _say_failed(error if isinstance(error, SpecDefError) else _system_failure(error))
            sys.exit(2 if isinstance(error, WrongUsage) else 1)
        except KeyboardInterrupt:
            _say_interrupted()
            sys.exit(INTERRUPTED)
        except SystemExit as leaving:  # how typer passes Ctrl-C on
            if leaving.code == INTERRUPTED:
                _say_interrupted()
            raise
        except Exception as error:
            if is_out_of_memory(error):
                _say_failed(_too_large(error))
            else:  # a defect of ours: printed here, where secrets are taken out
                traceback.print_exc()
            sys.exit(1)


def _say_failed(failure: SpecDefError) -> None:
    if os.environ.get("SPECDEF_DEBUG"):
        traceback.print_exc()
    console = Console(stderr=True, soft_wrap=True)
    console.print(f"[bold red]error:[/] {escape(_one_line(failure.problem))}", highlight=False)
    console.print(f"[bold]hint:[/] {escape(_one_line(failure.hint))}", highlight=False)


def _one_line(text: str) -> str:
    """Join lines: messages of other libraries and names of files may have several."""
    return printable(" ".join(text.splitlines()))


def _system_failure(error: OSError) -> SpecDefError:
    """The error for a full disk or a missing permission."""
    reason = error.strerror or str(error) or type(error).__name__
    return SpecDefError(
        reason if error.filename is None else f"{error.filename}: {reason}",
        "Check the path."
        if error.errno in WRONG_PATH
        else "Check the disk, its free space and the permissions, then run the same command again.",
    )


def _too_large(error: Exception) -> SpecDefError:
    """The error for too little memory, on the machine or on a GPU."""
    return SpecDefError(
        f"the memory is not enough: {first_line(error)}",
        "Take a machine or a device with more, or let an attack take less: --batch-size, --sequence-length, "
        "--gradient-accumulation, --gradient-checkpointing, a lower rank or growth. Finished runs are kept.",
    )


def _say_interrupted() -> None:
    Console(stderr=True, soft_wrap=True).print(
        "interrupted: no partial output was published. Continue harden and collapse with --resume; give attack and "
        "certify the same command again."
    )
