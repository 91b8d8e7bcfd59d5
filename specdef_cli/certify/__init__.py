"""Checks of a hardened checkpoint against its base: what was promised, measured.

The public names are imported on their first use: what ``--help`` says of the options needs neither transformers nor
torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

# ruff: noqa: F401 (the names of _PUBLIC, once more for type checkers, which do not see them looked up)
if TYPE_CHECKING:
    from specdef_cli.certify.certificate import Certificate, Claim
    from specdef_cli.certify.options import CertifyOptions
    from specdef_cli.certify.run import certify

from specdef_cli.callable_package import make_callable

_PUBLIC = {
    "Certificate": "specdef_cli.certify.certificate",
    "CertifyOptions": "specdef_cli.certify.options",
    "Claim": "specdef_cli.certify.certificate",
    "certify": "specdef_cli.certify.run",
}

__all__ = [*_PUBLIC]

make_callable(__name__)
