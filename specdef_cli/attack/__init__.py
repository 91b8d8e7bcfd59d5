"""Fine-tunes a model and its control, by strangers to the construction and by those who know it, and records how far
each gets.
"""

import logging
import sys

from specdef_cli import CallablePackage, __getattr__  # noqa: F401 (public names of this room are found there, too)

# PEFT imports bitsandbytes where it is installed, and that warns of kernels that nothing here uses.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

sys.modules[__name__].__class__ = CallablePackage
