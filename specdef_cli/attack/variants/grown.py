"""Grow a model whose weights were rescaled, and not its layers: fresh blocks beside or between the frozen ones.

A fold has no inserted layer that could be widened or deepened. An attacker with the memory for a larger model needs
none: the scaled weights are frozen, and a fresh block of the model's own class, with norms, attention heads and an MLP
of its own, reads the residual stream and adds to it. Nothing in its way is scaled. Its last linears start at zero, so
that the function is the same bit for bit before the first step.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from specdef_cli.attack.table import NotApplicable
from specdef_cli.errors import first_line
from specdef_cli.model import SpecDefLinear, SpecDefScaled
from specdef_cli.model.families import FAMILIES
from specdef_cli.model.loading import meta_model
from specdef_cli.model.sites import writers
from specdef_cli.model.skeleton import repeated_blocks
from specdef_cli.model.symmetries import symmetric_pairs

_CACHE_ARGUMENTS = ("past_key_values", "past_key_value", "layer_past")


def outermost_block_paths(model: nn.Module) -> tuple[str, ...]:
    """Paths of the blocks that a model repeats, of each of its stacks; no lists within a block (T5's, experts)."""
    paths = repeated_blocks(model)
    return tuple(path for path in paths if not any(path.startswith(f"{outer}.") for outer in paths))


def stream_writers(model: PreTrainedModel) -> tuple[str, ...]:
    """Module paths of the linears that write to the residual stream, as they were before hardening."""
    hardened = any(isinstance(module, SpecDefLinear | SpecDefScaled) for module in model.modules())
    return writers(meta_model(model.config) if hardened else model)


def grow_beside(model: PreTrainedModel, factor: float, seed: int) -> None:
    """A second path beside every block: block(x) + fresh(x) − x, so that the blocks are ``factor`` times as large."""
    _grow(model, factor, seed, _beside)


def grow_between(model: PreTrainedModel, factor: float, seed: int) -> None:
    """Fresh blocks after every block, so that there are ``factor`` times as many."""
    _grow(model, factor, seed, _after)


def first_tensor(output: Any) -> Tensor:
    """Return the hidden state of a block's output: a tensor, or the first of a tuple."""
    return output[0] if isinstance(output, tuple) else output


def with_first_tensor(output: Any, hidden: Tensor) -> Any:
    """Replace the hidden state in ``output``."""
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def _grow(model: PreTrainedModel, factor: float, seed: int, hook: Callable[..., Any]) -> None:
    """Hooks and not wrappers: every parameter keeps its name, and the model finds what it reads off a block."""
    places = {path: model.get_submodule(path) for path in outermost_block_paths(model)}
    if not places:
        raise NotApplicable(
            f"{type(model).__name__} has no blocks to grow", "Leave --expand out, or harden with --method factors."
        )
    freeze_scaled(model, places)
    ends = stream_writers(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for number, (path, block) in enumerate(places.items()):
            fresh = [_fresh_block(model, path, number, share, _within(path, ends)) for share in _shares(factor)]
            block.add_module("grown", nn.ModuleList(fresh))
            block.grown_unseen = True
            block.register_forward_hook(hook, with_kwargs=True)
    model.config.use_cache = False  # a fresh block keeps none


def freeze_scaled(model: PreTrainedModel, blocks: dict[str, nn.Module]) -> None:
    """Freeze what can have been scaled: every side of a symmetric pair, scaled modules, and the blocks as a whole."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for pair in symmetric_pairs(model):
        for side in pair.sides:
            parameters[side.tensor].requires_grad_(False)
    for module in model.modules():
        if isinstance(module, SpecDefScaled):
            module.requires_grad_(False)
    for block in blocks.values():
        block.requires_grad_(False)


def _shares(factor: float) -> list[float]:
    """Sizes of fresh blocks, each relative to the block that it stands beside: 2.5 is [1, 0.5]."""
    more = factor - 1
    whole = math.floor(more)
    return [1.0] * whole + ([more - whole] if more > whole else [])


def _fresh_block(model: PreTrainedModel, path: str, number: int, share: float, ends: list[str]) -> nn.Module:
    """A block of the class of the one at ``path`` with fresh weights, whose last linears (``ends``) are zero."""
    block = model.get_submodule(path)
    like = next(block.parameters())
    owner = _owner(model, path)
    config = _smaller(owner.config.get_text_config() if owner.config is model.config else owner.config, share)
    try:
        taken = set(inspect.signature(type(block).__init__).parameters)
        index = {name: number for name in ("layer_idx", "layer_index", "layer_id") if name in taken}
        fresh = type(block)(config, **index)
    except (TypeError, ValueError, AttributeError) as error:
        raise NotApplicable(
            f"a fresh {type(block).__name__} cannot be made: {first_line(error)}", "Leave --expand out for this model."
        ) from error
    fresh.apply(model._init_weights)
    for end in ends:
        for parameter in fresh.get_submodule(end).parameters():
            nn.init.zeros_(parameter)
    for name, parameter in fresh.named_parameters():  # experts are stacked in one parameter
        if name.endswith(("down_proj", "down_proj_bias")):
            nn.init.zeros_(parameter)
    family = FAMILIES.get(type(owner).__name__)
    if family is not None and family.is_post_norm:
        for norm in family.output_norms:  # what it reads is normalized already, and must come out as it was
            fresh.set_submodule(norm, nn.Identity())
    return fresh.to(like.device, like.dtype).requires_grad_(True).train(block.training)


def _within(path: str, names: Iterable[str]) -> list[str]:
    return [name.removeprefix(f"{path}.") for name in names if name.startswith(f"{path}.")]


def _owner(model: PreTrainedModel, path: str) -> PreTrainedModel:
    """The innermost pretrained model around a block: T5's encoder and decoder have a config each."""
    module: nn.Module = model
    owner = model
    for name in path.split("."):
        module = module.get_submodule(name)
        if isinstance(module, PreTrainedModel):
            owner = module
    return owner


def _smaller(config: Any, share: float) -> Any:
    """The config of a block with about this share of the parameters: fewer heads, and a narrower MLP."""
    if share >= 1:
        return config
    found = copy.deepcopy(config)
    if getattr(config, "head_dim", None) and getattr(config, "num_key_value_heads", None):
        group = config.num_attention_heads // config.num_key_value_heads
        found.num_key_value_heads = max(1, math.ceil(share * config.num_key_value_heads))
        found.num_attention_heads = group * found.num_key_value_heads
    for key in ("intermediate_size", "moe_intermediate_size"):
        if isinstance(getattr(config, key, None), int):
            setattr(found, key, math.ceil(share * getattr(config, key)))
    return found


def _call(fresh: nn.Module, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    rest = {key: value for key, value in kwargs.items() if key != "hidden_states"}
    rest |= {key: None for key in _CACHE_ARGUMENTS if key in rest}
    if "use_cache" in rest:
        rest["use_cache"] = False
    return first_tensor(fresh(hidden, *args[1:], **rest))


def _beside(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    entering = args[0] if args else kwargs["hidden_states"]
    hidden = first_tensor(output)
    for fresh in block.grown:
        hidden = hidden + (_call(fresh, entering, args, kwargs) - entering)  # exactly zero at first
    return with_first_tensor(output, _checked(block, first_tensor(output), hidden))


def _after(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    hidden = first_tensor(output)
    for fresh in block.grown:
        hidden = _call(fresh, hidden, args, kwargs)
    return with_first_tensor(output, _checked(block, first_tensor(output), hidden))


def _checked(block: Any, plain: Tensor, grown: Tensor) -> Tensor:
    """``grown``, which at the first call is ``plain``: where a family is not described, a norm may stand in the way."""
    if block.grown_unseen and not torch.equal(plain, grown):
        raise NotApplicable(
            f"a fresh {type(block).__name__} changes what the model computes before it is trained",
            "Leave --expand out for this model: its family is not described.",
        )
    block.grown_unseen = False
    return grown
