"""The trainings of an attack, as a table: all parameters, some of them, or adapters, and where those are put.

A row is all that the rest of the package knows of a training: what it is called, and the function that makes a model
train it. A row may instead stand for other trainings, which for some depend on the model: ``groups`` is one for each
kind of parameter that the control has.

Of PEFT's methods everything has a row that goes on any linear and that trains an ordinary model. Left out, and why:
AdaLoRA and Shadow (their loss is not the language model's alone), VB-LoRA and UniLoRA (they start at another function
than the model's), CPT (its loss was not a number), Poly and multitask prompt tuning (they need tasks), X-LoRA (a
mixture of adapters that are trained already), Adaption Prompt (it needs to be told where, for each family), Trainable
Tokens (embeddings, of tokens that are named). The rest of PEFT's has not been tried in earnest.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, Literal

from specdef_cli.attack.table import Factor, NotApplicable, Table, checked_factor, parse_number
from specdef_cli.errors import WrongUsage

if TYPE_CHECKING:
    from torch import nn

    from specdef_cli.attack.target import Target, Task


Place = Literal["linears", "usual", "norms", "prompt"]


@dataclass(frozen=True)
class PeftMethod:
    name: str
    label: str
    paper: str
    config: str
    size: Factor | None = None  # the number it takes
    size_argument: str = "r"  # what config calls that number
    arguments: Mapping[str, Any] = field(default_factory=dict)  # what else config is made with
    on: Place = "linears"
    """On which modules it goes by default: ``usual``, where PEFT puts it; ``prompt``, on none and in front of the
    sequence."""
    alpha: int | None = None  # LoRA's α over the rank
    function: str = "train_adapters"  # of adapters.py
    help: str = ""  # by default made of the label, the place and the paper


_RANK = Factor("rank", 16)
_TOKENS = Factor("number of tokens", 16)

PEFT_METHODS: tuple[PeftMethod, ...] = (
    PeftMethod("lora", "LoRA", "arXiv 2106.09685", "LoraConfig", _RANK, alpha=2),
    PeftMethod("lora-default", "LoRA default", "arXiv 2106.09685", "LoraConfig", _RANK, on="usual", alpha=2,
               help="LoRA where PEFT puts it (query and value projections, for Llama), or on modules named."),
    PeftMethod("qlora", "QLoRA", "arXiv 2305.14314", "LoraConfig", _RANK, alpha=2, function="train_qlora",
               help="LoRA on linears in 4 bits (NF4, double quantization, computed in bfloat16; arXiv 2305.14314)."),
    PeftMethod("qlora-single", "QLoRA without double quantization", "arXiv 2305.14314", "LoraConfig", _RANK, alpha=2,
               function="train_qlora", help="QLoRA with the scales of blocks in float32."),
    PeftMethod("dora", "DoRA", "arXiv 2402.09353", "LoraConfig", _RANK, arguments={"use_dora": True}, alpha=2),
    PeftMethod("pissa", "PiSSA", "arXiv 2404.02948", "LoraConfig", _RANK,
               arguments={"init_lora_weights": "pissa"}, alpha=1,
               help="LoRA that starts from the weights' principal directions (arXiv 2404.02948)."),
    PeftMethod("ia3", "IA³", "arXiv 2205.05638", "IA3Config", on="usual"),
    PeftMethod("hira", "HiRA", "Huang et al. 2025", "HiraConfig", _RANK),
    PeftMethod("loha", "LoHa", "arXiv 2108.06098", "LoHaConfig", _RANK),
    PeftMethod("lokr", "LoKr", "arXiv 2309.14859", "LoKrConfig", _RANK),
    PeftMethod("oft", "OFT", "arXiv 2306.07280", "OFTConfig", Factor("block size", 16), "oft_block_size"),
    PeftMethod("boft", "BOFT", "arXiv 2311.06243", "BOFTConfig", Factor("block size", 4), "boft_block_size"),
    PeftMethod("hra", "HRA", "arXiv 2405.17484", "HRAConfig", Factor("number of reflections", 8)),
    PeftMethod("vera", "VeRA", "arXiv 2310.11454", "VeraConfig", Factor("rank", 256)),
    PeftMethod("randlora", "RandLoRA", "arXiv 2502.00987", "RandLoraConfig", _RANK),
    PeftMethod("delora", "DeLoRA", "arXiv 2503.18225", "DeloraConfig", _RANK),
    PeftMethod("gralora", "GraLoRA", "arXiv 2505.20355", "GraloraConfig", _RANK),
    PeftMethod("miss", "MiSS", "arXiv 2409.15371", "MissConfig", _RANK),
    PeftMethod("c3a", "C³A", "arXiv 2407.19342", "C3AConfig", Factor("block size", 16), "block_size",
               {"init_weights": True}),
    PeftMethod("fourierft", "FourierFT", "arXiv 2405.03003", "FourierFTConfig", Factor("number of frequencies", 256),
               "n_frequency", {"init_weights": True}),
    PeftMethod("waveft", "WaveFT", "arXiv 2505.12532", "WaveFTConfig", Factor("number of frequencies", 256),
               "n_frequency"),
    PeftMethod("road", "RoAd", "arXiv 2409.00119", "RoadConfig", Factor("group size", 16), "group_size"),
    PeftMethod("shira", "SHiRA", "arXiv 2406.13175", "ShiraConfig", Factor("rank", 4)),
    PeftMethod("psoft", "PSOFT", "arXiv 2505.11235", "PsoftConfig", _RANK),
    PeftMethod("ln-tuning", "LN tuning", "arXiv 2312.11420", "LNTuningConfig", on="norms"),
    PeftMethod("prefix", "prefix tuning", "arXiv 2101.00190", "PrefixTuningConfig", _TOKENS, "num_virtual_tokens",
               on="prompt"),
    PeftMethod("p-tuning", "P-tuning", "arXiv 2103.10385", "PromptEncoderConfig", _TOKENS, "num_virtual_tokens",
               on="prompt"),
    PeftMethod("prompt", "prompt tuning", "arXiv 2104.08691", "PromptTuningConfig", _TOKENS, "num_virtual_tokens",
               on="prompt"),
)  # fmt: skip


@dataclass(frozen=True)
class TrainingChoice:
    """A row of the table: either ``function`` or ``stands_for`` is set; ``none`` has neither."""

    name: str
    label: str  # a few words for a table; {size} and {where} stand for what follows : and @
    help: str
    function: str | None = None
    """``package.module:name`` of a function (model, training, task) → the model that the Trainer gets. It sets which
    parameters train, or puts adapters on. What a variant has frozen stays frozen."""
    stands_for: str | None = None
    """``package.module:name`` of a function (training, target) → the trainings that it means on a target; none where
    the target has nothing for it."""
    size: Factor | None = None  # the number after the colon (a rank, a count of tokens); None where it takes none
    where: Literal["parameters", "modules", "groups"] | None = None
    """What the names after ``@`` are: globs of ``parameters``, ``modules`` by the end of their path, as PEFT takes
    them, or kinds of parameters (``groups``). ``None`` where it takes none."""
    label_everywhere: str | None = None  # the label where no names are given; by default label


_HERE = "specdef_cli.attack.trainings"
_UNITS = Factor("number of units", 16)
_PLACES: Mapping[Place, str] = {
    "linears": " on every linear, or on those named",
    "usual": " where PEFT puts it, or on modules named",
    "norms": " on every norm, or on those named",
    "prompt": ": so many trained tokens",
}


def _peft_row(method: PeftMethod) -> TrainingChoice:
    placed = method.on != "prompt"
    everywhere = f"{method.label} on every linear" if method.alpha and method.on == "linears" else method.label
    return TrainingChoice(
        method.name,
        f"{method.label} {{where}}" if placed else method.label,
        method.help or f"{method.label[0].upper()}{method.label[1:]}{_PLACES[method.on]} ({method.paper}).",
        function=f"{_HERE}.adapters:{method.function}",
        size=method.size,
        where="modules" if placed else None,
        label_everywhere=everywhere if placed else None,
    )


TRAININGS: Table[TrainingChoice] = Table(
    "training",
    "specdef.attack_trainings",
    TrainingChoice,
    (
        TrainingChoice(
            "full", "full fine-tuning on {where}",
            "Every parameter, those that globs name (full@*norm*), or all but some (full@!*bias).",
            function=f"{_HERE}.own:train_parameters", where="parameters", label_everywhere="full fine-tuning",
        ),
        TrainingChoice("none", "no training", "Nothing: edits such as --variant abliterate need no training."),
        TrainingChoice(
            "groups", "each kind of parameter alone",
            "Each kind of parameter alone: embeddings, norms, each linear; or some: groups@norms,head.",
            stands_for=f"{_HERE}.own:parameter_groups", where="groups",
        ),
        TrainingChoice(
            "all-but-first", "all but the first layer", "Everything but the embeddings and the first block.",
            stands_for=f"{_HERE}.own:all_but_the_first",
        ),
        TrainingChoice(
            "last-half", "the last half of the layers",
            "Everything but the embeddings and the first half of the blocks.",
            stands_for=f"{_HERE}.own:last_half",
        ),
        TrainingChoice(
            "adapter", "adapters", "Bottleneck adapters after every attention and MLP (arXiv 1902.00751).",
            function=f"{_HERE}.own:train_serial", size=_UNITS,
        ),
        TrainingChoice(
            "adapter-parallel", "adapters beside blocks", "Bottleneck adapters beside every block (arXiv 2110.04366).",
            function=f"{_HERE}.own:train_parallel", size=_UNITS,
        ),
        *map(_peft_row, PEFT_METHODS),
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Training:
    """A training as it is asked for: ``full``, ``full@*norm*``, ``lora:16``, ``lora:4@q_proj,v_proj``."""

    method: str = "full"
    size: float | None = None  # the number that it takes (a rank, a count of tokens); its default where none is given
    where: tuple[str, ...] = ()
    """Globs of parameter names, or modules by the end of their path; empty for wherever the method goes."""
    name: str = field(default="", compare=False)
    """What to call it in a table; by default it is put together from the rest. Two trainings that differ in their names
    alone are the same one."""

    def __post_init__(self) -> None:
        choice = TRAININGS.choose(self.method)
        object.__setattr__(self, "size", checked_factor(f"training {self.method}", choice.size, self.size))
        object.__setattr__(self, "where", tuple(self.where))
        if self.where and choice.where is None:
            raise WrongUsage(
                f"training '{self.method}' takes no '@names' (got '{','.join(self.where)}')",
                "Leave out the part after '@'.",
            )
        if not all(self.where):
            raise WrongUsage(f"the training {self} names nothing after '@' or ','", "Write it like full@*norm*.")

    @classmethod
    def parse(cls, text: str) -> Training:
        """Read a training: a name of the table, ``:`` and a number, ``@`` and names with commas between."""
        head, at, names = text.partition("@")
        method, colon, number = head.partition(":")
        TRAININGS.choose(method)
        size = parse_number(method, number) if colon else None
        return cls(method, size, tuple(name.strip() for name in names.split(",")) if at else ())

    def __str__(self) -> str:
        size = "" if self.size is None else f":{self.size}"
        return f"{self.method}{size}" + (f"@{','.join(self.where)}" if self.where else "")

    @property
    def choice(self) -> TrainingChoice:
        return TRAININGS[self.method]

    @property
    def label(self) -> str:
        """As people say it: ``full fine-tuning``, ``LoRA on every linear``, ``full fine-tuning on *norm*``."""
        if self.name:
            return self.name
        choice = self.choice
        pattern = choice.label if self.where or choice.label_everywhere is None else choice.label_everywhere
        label = pattern.replace("{where}", ",".join(self.where)).replace("{size}", str(self.size))
        unusual = choice.size is not None and self.size != choice.size.default and "{size}" not in pattern
        return f"{label}, {choice.size.meaning} {self.size}" if unusual and choice.size else label

    def on(self, target: Target) -> tuple[Training, ...]:
        """The trainings that it stands for on a target; most stand for themselves."""
        if self.choice.stands_for is None:
            return (self,)
        return resolve_name(self.choice.stands_for)(self, target)

    def rehearse(self, target: Target) -> None:
        """Refuse what cannot be put on the control, before any run; the control has no numbers here."""
        try:
            self.apply(copy.deepcopy(target.control_model()), target.task)
        except (NotApplicable, RuntimeError) as error:
            if isinstance(error, NotApplicable) and "meta" not in error.problem:
                raise

    def apply(self, model: nn.Module, task: Task) -> nn.Module:
        """Set what trains. What a variant has frozen stays frozen."""
        assert self.choice.function is not None, f"{self} stands for other trainings"
        function: Callable[..., nn.Module] = resolve_name(self.choice.function)
        return function(model, self, task)
