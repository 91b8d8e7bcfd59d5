"""Checks of a hardened checkpoint against its base: what was promised, measured."""
