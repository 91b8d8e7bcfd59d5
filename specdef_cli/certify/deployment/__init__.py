"""What of a checkpoint's life after release still works after hardening: dtypes, quantization, engines, adapters.

A row of :data:`~specdef_cli.certify.deployment.formats.FORMATS` is one thing that others do to a published checkpoint.
It is done by the tool that they use (bitsandbytes, torchao, llama.cpp, PEFT, …) where that tool is installed; elsewhere
some rows have a stand-in that rounds weights and activations as the tool would, and every figure says which it was.
"""

from specdef_cli.certify.deployment.figure import DeploymentFigure, Outcome, compare, judge
from specdef_cli.certify.deployment.formats import DEFAULT_FORMATS, FORMATS, Format
from specdef_cli.certify.deployment.measure import measure_deployment, measure_format, require_formats
from specdef_cli.certify.deployment.trial import Trial, mean_loss, next_token_loss
from specdef_cli.runtime.tokens import token_batch

__all__ = [
    "DEFAULT_FORMATS",
    "FORMATS",
    "DeploymentFigure",
    "Format",
    "Outcome",
    "Trial",
    "compare",
    "judge",
    "mean_loss",
    "measure_deployment",
    "measure_format",
    "next_token_loss",
    "require_formats",
    "token_batch",
]
