"""Checks of a hardened checkpoint against its base: what was promised, measured."""

# ruff: noqa: E402 (the imports below need what is asked for first)
from specdef_cli.extras import require_extra

require_extra("attack", "certificates")

from specdef_cli.callable_package import make_callable
from specdef_cli.certify.certificate import Certificate, Claim
from specdef_cli.certify.run import CertifyOptions, certify

__all__ = ["Certificate", "CertifyOptions", "Claim", "certify"]

make_callable(__name__)
