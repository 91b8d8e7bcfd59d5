"""Fine-tunes a model and its control, by strangers to the construction and by those who know it, and records how far
each gets.
"""

import sys

from specdef_cli import CallablePackage, __getattr__  # noqa: F401 (public names of this room are found there, too)

sys.modules[__name__].__class__ = CallablePackage
