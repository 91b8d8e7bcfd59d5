"""Descriptions of each family's blocks, as far as exact symmetries depend on them.

Every entry was read off the family's modeling code in transformers; the tests hold each one to ``torch.equal`` logits.
A family that is not here has no pairs: guessing them from names would publish broken models.

What decides whether a symmetry holds:

- Attention is bilinear in queries and keys and linear in values. Without positions in between, queries and keys trade
  scales channel by channel; RoPE mixes the two channels of a plane, which must share one; a q/k norm undoes any scale
  before it, but its own gains come after it. A clamp on q, k and v breaks all of this.
- A gated MLP is linear in its up branch. An ungated one is only positively homogeneous, and only with some activations.
- A norm's gain (and bias) is followed by the linears that read it, unless its output is also added to the residual
  stream (post-norm: BERT) or the gain is stored as 1+w, which does not scale exactly (Gemma).

The scale of the residual stream is a symmetry too, if the norms' ε in config.json follows. It is not looked for,
because it is not folded (docs/decisions.md).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

# act(λx) = λ·act(x) for λ > 0, exactly so in floating point when λ is a power of two.
HOMOGENEOUS_ACTIVATIONS = frozenset({"relu", "leaky_relu", "linear"})

Role = Literal["attention_output", "mlp_down", "other"]
"""Where a linear layer writes: to the residual stream, as the last one of an attention or an MLP, or elsewhere."""


@dataclass(frozen=True)
class Attention:
    """One attention sublayer of a block. Paths are relative: ``path`` to the block, the rest to ``path``.

    Attributes:
        path: The attention module.
        query, key, value: The projections; the same module three times where they are fused.
        output: The output projection, relative to ``path``.
        fused: How the rows of a fused projection are ordered: ``stacked`` is [q | k | v], ``per_head`` is [q | k | v]
            within each head. ``None``: three projections.
        rope: Whether RoPE (half-split planes) acts on queries and keys.
        norm: The norm that the projections read, relative to the block; ``None`` where they read the stream itself.
        cross: Whether keys and values are read from the encoder's final norm instead.
        query_norm, key_norm: Norms on queries and keys. ``norm_width`` says whether they run over one head (and share
            their gain between heads) or over all heads.
        clip: The config key of a clamp on q, k and v.
    """

    path: str
    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"
    output: str = "o_proj"
    fused: Literal["stacked", "per_head"] | None = None
    rope: bool = True
    norm: str | None = "input_layernorm"
    cross: bool = False
    query_norm: str | None = None
    key_norm: str | None = None
    norm_width: Literal["head", "all_heads"] = "head"
    clip: str | None = None

    role: ClassVar[Role] = "attention_output"

    @property
    def readers(self) -> tuple[str, ...]:
        """The linears that read a hidden state; the first reads the norm, whatever the others do."""
        return tuple(dict.fromkeys((self.query, self.key, self.value)))

    @property
    def writer(self) -> str:
        """The linear that writes to the residual stream."""
        return self.output


@dataclass(frozen=True)
class Mlp:
    """One dense MLP sublayer: ``down(act(gate x) ⊙ up x)``, or ``down(act(up x))`` where ``gate`` is ``None``.

    Attributes:
        path: The MLP module, relative to the block; may be empty.
        fused: Whether ``gate`` and ``up`` are the same module, with rows [gate | up].
        activation: The config key that names the activation.
        norm: As in :class:`Attention`.
    """

    path: str = "mlp"
    gate: str | None = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    fused: bool = False
    activation: str = "hidden_act"
    norm: str | None = "post_attention_layernorm"

    role: ClassVar[Role] = "mlp_down"

    @property
    def readers(self) -> tuple[str, ...]:
        """The linears that read a hidden state."""
        return tuple(dict.fromkeys(filter(None, (self.gate, self.up))))

    @property
    def writer(self) -> str:
        return self.down


@dataclass(frozen=True)
class Experts:
    """A mixture-of-experts sublayer whose experts are stacked in parameters ``gate_up_proj`` and ``down_proj``.

    Attributes:
        path: The module with the stacked parameters, relative to the block.
        readers: Further parameters that read the same norm (columns are the last axis): the router first.
        transposed: Whether an expert is stored as [in, out].
        gated_linearly: Whether the expert is linear in its up branch (GPT-OSS clamps it and adds 1: it is not).
        norm: As in :class:`Attention`.
    """

    path: str = "mlp.experts"
    readers: tuple[str, ...] = ("mlp.gate.weight",)
    transposed: bool = False
    gated_linearly: bool = True
    norm: str | None = "post_attention_layernorm"


@dataclass(frozen=True)
class Stack:
    """A run of equal blocks with its own residual stream; sublayers that a block lacks are skipped.

    Attributes:
        blocks: The ``ModuleList``, relative to the body.
        sublayers: What a block may be made of.
        final_norm: The norm after the last block, relative to the body; ``None`` in a post-norm stack.
    """

    blocks: str
    sublayers: tuple[Attention | Mlp | Experts, ...]
    final_norm: str | None


@dataclass(frozen=True)
class Family:
    """A model's body (the model without head).

    Attributes:
        stacks: Usually one; the encoder comes first.
        gain: How norms store their gain: as such, as 1+w, or not at all.
        output_norms: The norms on the sublayers' outputs (OLMo 2, Gemma) or after the addition (BERT), relative to the
            block; in block order.
        heads: Suffix of the model's class name → what reads the final hidden state, relative to the whole model.
            ``None`` stands for the output embeddings.
        head_norm: The norm of a masked-language head, before the output embeddings.
        unpaired: Parameters of a block (by the end of their name) that no symmetry involves, and why.
    """

    stacks: tuple[Stack, ...]
    gain: Literal["plain", "one_plus", "none"] = "plain"
    output_norms: tuple[str, ...] = ()
    heads: tuple[tuple[str, str | None], ...] = (
        ("ForCausalLM", None),
        ("ForSequenceClassification", "score"),
        ("ForTokenClassification", "score"),
        ("ForQuestionAnswering", "qa_outputs"),
    )
    head_norm: str | None = None
    unpaired: tuple[tuple[str, str], ...] = ()

    @property
    def is_post_norm(self) -> bool:
        """Whether norms come after the addition, so that their output is the residual stream."""
        return any(stack.final_norm is None for stack in self.stacks)


def _stack(
    *sublayers: Attention | Mlp | Experts, blocks: str = "layers", final_norm: str | None = "norm"
) -> tuple[Stack, ...]:
    return (Stack(blocks, sublayers, final_norm),)


_SELF_ATTENTION = Attention("self_attn")
_NORMED_ATTENTION = Attention("self_attn", query_norm="q_norm", key_norm="k_norm")
_LLAMA = Family(_stack(_SELF_ATTENTION, Mlp()))

_GEMMA_MLP = Mlp(norm="pre_feedforward_layernorm")
_GEMMA = Family(
    _stack(_SELF_ATTENTION, _GEMMA_MLP),
    gain="one_plus",
    output_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
)

_BERT = Family(
    _stack(
        Attention("attention", "self.query", "self.key", "self.value", "output.dense", rope=False, norm=None),
        Mlp("", None, "intermediate.dense", "output.dense", norm=None),
        blocks="encoder.layer",
        final_norm=None,
    ),
    output_norms=("attention.output.LayerNorm", "output.LayerNorm"),
    heads=(
        ("ForMaskedLM", "cls.predictions.transform.dense"),
        ("ForSequenceClassification", "bert.pooler.dense"),
        ("ForTokenClassification", "classifier"),
        ("ForQuestionAnswering", "qa_outputs"),
    ),
    head_norm="cls.predictions.transform.LayerNorm",
)
_ROBERTA = replace(
    _BERT,
    heads=(
        ("ForMaskedLM", "lm_head.dense"),
        ("ForSequenceClassification", "classifier.dense"),
        ("ForTokenClassification", "classifier"),
        ("ForQuestionAnswering", "qa_outputs"),
    ),
    head_norm="lm_head.layer_norm",
)

_T5_ATTENTION = Attention("layer.0.SelfAttention", "q", "k", "v", "o", rope=False, norm="layer.0.layer_norm")
_T5_CROSS = Attention("layer.1.EncDecAttention", "q", "k", "v", "o", rope=False, norm="layer.1.layer_norm", cross=True)


def _t5_stack(side: str, *attentions: Attention) -> tuple[Stack, ...]:
    path, norm = (f"layer.{len(attentions)}.{name}" for name in ("DenseReluDense", "layer_norm"))
    plain = Mlp(path, None, "wi", "wo", activation="dense_act_fn", norm=norm)
    gated = Mlp(path, "wi_0", "wi_1", "wo", norm=norm)
    return _stack(*attentions, plain, gated, blocks=f"{side}.block", final_norm=f"{side}.final_layer_norm")


_T5 = Family(
    _t5_stack("encoder", _T5_ATTENTION) + _t5_stack("decoder", _T5_ATTENTION, _T5_CROSS),
    heads=(("T5ForConditionalGeneration", None),),
    unpaired=(("relative_attention_bias.weight", "it is added to the scores, and a softmax follows"),),
)

# Class of the body → family.
FAMILIES: dict[str, Family] = {
    "LlamaModel": _LLAMA,
    "MistralModel": _LLAMA,
    "Qwen2Model": _LLAMA,
    "Qwen3Model": Family(_stack(_NORMED_ATTENTION, Mlp())),
    "Gemma2Model": _GEMMA,
    "Gemma3TextModel": replace(_GEMMA, stacks=_stack(_NORMED_ATTENTION, _GEMMA_MLP)),
    "Phi3Model": Family(
        _stack(
            Attention("self_attn", "qkv_proj", "qkv_proj", "qkv_proj", fused="stacked"),
            Mlp(gate="gate_up_proj", up="gate_up_proj", fused=True),
        )
    ),
    "OlmoModel": Family(_stack(Attention("self_attn", clip="clip_qkv"), Mlp()), gain="none"),
    "Olmo2Model": Family(
        _stack(
            Attention("self_attn", query_norm="q_norm", key_norm="k_norm", norm_width="all_heads", norm=None),
            Mlp(norm=None),
        ),
        output_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
    ),
    "GPT2Model": Family(
        _stack(
            Attention("attn", "c_attn", "c_attn", "c_attn", "c_proj", fused="stacked", rope=False, norm="ln_1"),
            Mlp("mlp", None, "c_fc", "c_proj", activation="activation_function", norm="ln_2"),
            blocks="h",
            final_norm="ln_f",
        ),
        heads=(("LMHeadModel", None), ("ForSequenceClassification", "score"), ("ForTokenClassification", "classifier")),
    ),
    "GPTNeoXModel": Family(
        _stack(
            Attention("attention", "query_key_value", "query_key_value", "query_key_value", "dense", fused="per_head"),
            Mlp("mlp", None, "dense_h_to_4h", "dense_4h_to_h"),
            final_norm="final_layer_norm",
        ),
        heads=(("ForCausalLM", None), ("ForSequenceClassification", "score"), ("ForTokenClassification", "classifier")),
    ),
    "BertModel": _BERT,
    "RobertaModel": _ROBERTA,
    "ViTModel": Family(
        _stack(
            Attention("attention", rope=False, norm="layernorm_before"),
            Mlp("mlp", None, "fc1", "fc2", norm="layernorm_after"),
            final_norm="layernorm",
        ),
        heads=(("ForImageClassification", "classifier"),),
    ),
    **dict.fromkeys(("T5Model", "T5EncoderModel", "T5ForConditionalGeneration"), _T5),
    "MixtralModel": Family(_stack(_SELF_ATTENTION, Experts())),
    "Qwen2MoeModel": Family(
        _stack(
            _SELF_ATTENTION,
            Mlp(),
            Experts(readers=("mlp.gate.weight", "mlp.shared_expert_gate.weight")),
            Mlp("mlp.shared_expert"),
        )
    ),
    "Qwen3MoeModel": Family(_stack(_NORMED_ATTENTION, Mlp(), Experts())),
    "GptOssModel": Family(
        _stack(
            _SELF_ATTENTION,
            Experts(readers=("mlp.router.weight",), transposed=True, gated_linearly=False),
        ),
        unpaired=(("self_attn.sinks", "they are scores of their own, and a softmax follows"),),
    ),
}

DENOISER_WRITERS: dict[str, dict[str, Role]] = {
    "UNet2DConditionModel": {"to_out.0": "attention_output", "ff.net.2": "mlp_down"},
}
"""Of diffusers' models, which have no symmetric pairs: class → ends of the paths of what writes to the stream."""
