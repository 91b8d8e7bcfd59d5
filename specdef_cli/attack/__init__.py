"""Fine-tunes a model and its control, by strangers to the construction and by those who know it, and records how far
each gets.
"""

import sys

from specdef_cli.process import CallablePackage

sys.modules[__name__].__class__ = CallablePackage
