"""The package's version: what a manifest and a certificate name, and what a release raises."""

__version__ = "0.1.0"
