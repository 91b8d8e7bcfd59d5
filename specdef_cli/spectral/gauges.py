"""The ways to factorize W = C·W~ (:mod:`specdef_cli.spectral.reparameterize`) by name; imported where torch is not."""

from __future__ import annotations

from typing import Literal

Gauge = Literal["rotated", "symmetric"]
