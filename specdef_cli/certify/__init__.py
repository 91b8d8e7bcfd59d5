"""Checks of a hardened checkpoint against its base: what was promised, measured."""

from specdef_cli.certify.certificate import Certificate, Claim
from specdef_cli.certify.run import CertifyOptions, certify

__all__ = ["Certificate", "CertifyOptions", "Claim", "certify"]
