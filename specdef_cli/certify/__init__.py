"""Checks of a hardened checkpoint against its base: what was promised, measured."""

from specdef_cli.callable_package import make_callable
from specdef_cli.certify.certificate import Certificate, Claim
from specdef_cli.certify.run import CertifyOptions, certify

__all__ = ["Certificate", "CertifyOptions", "Claim", "certify"]

make_callable(__name__)
