"""From a row of the table to an optimizer of a model's trainable parameters.

The parameters are taken from the model as it stands, so that this works after sharding too.
"""

from __future__ import annotations

from collections.abc import Collection

from peft import PeftModel
from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from specdef_cli.architectures.head import output_embeddings
from specdef_cli.attack.optimizers.table import OptimizerChoice


def build_optimizer(
    choice: OptimizerChoice,
    model: nn.Module,
    learning_rate: float,
    *,
    weight_decay: float = 0.0,
    decayed: Collection[str] = (),
) -> Optimizer:
    """Construct an optimizer for whatever is trainable in ``model``.

    Args:
        choice: The row.
        model: As it will be trained, wrapped where it is sharded.
        learning_rate: The same for every group.
        weight_decay: As the optimizer takes it.
        decayed: Names of the parameters that decay.
    """
    matrices = hidden_matrices(model) if choice.matrix_option else frozenset()
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((parameter in matrices, name in decayed), []).append(parameter)
    described = [
        {"params": parameters, "lr": learning_rate, "weight_decay": weight_decay if decays else 0.0}
        | ({choice.matrix_option: matrix} if choice.matrix_option else {})
        for (matrix, decays), parameters in groups.items()
    ]
    return choice.load()(described, lr=learning_rate, **choice.arguments)


def hidden_matrices(model: nn.Module) -> frozenset[nn.Parameter]:
    """The matrices between a model's embeddings and its head, adapters included: what Muon is for.

    Embeddings, the head, norms and biases are not among them, as Muon's author prescribes (Jordan et al. 2024); nor are
    convolutions, which in a Transformer embed patches.
    """
    whole = model.get_base_model() if isinstance(model, PeftModel) else model
    head = output_embeddings(whole)
    outside = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    outside |= set(head.parameters() if head is not None else ())
    trunk = whole.base_model if isinstance(whole, PreTrainedModel) else whole  # all but the head
    return frozenset(parameter for parameter in trunk.parameters() if parameter.ndim == 2 and parameter not in outside)
