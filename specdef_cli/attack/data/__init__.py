"""What an attack trains on, cut and split once, for the control and every attack alike.

A budget of S steps of B sequences never sees more than S·B of them, so no more are prepared, however large the data
set is. Every tenth row is held out: a row is a document, and nothing of it is in both halves.
"""

from specdef_cli.attack.data.attack_data import AttackData, Examples
from specdef_cli.attack.data.language import BUILTIN_NAME, builtin_documents
from specdef_cli.attack.data.load import Preprocessor, load_data, load_preprocessor
from specdef_cli.attack.data.tokens import Sequences

__all__ = [
    "BUILTIN_NAME",
    "AttackData",
    "Examples",
    "Preprocessor",
    "Sequences",
    "builtin_documents",
    "load_data",
    "load_preprocessor",
]
