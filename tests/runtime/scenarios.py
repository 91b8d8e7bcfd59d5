"""What a stranger's process does with hardened directories. Run as a script; the scenarios are run in their order.

    python scenarios.py '{"<scenario>": {<arguments>}, …}'   →   a JSON object of what each ended with, "" where it held

With ``without_package`` first, ``specdef_cli`` cannot be imported here, wherever it is installed.
"""

from __future__ import annotations

import json
import pickle
import sys
import traceback
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch

HEADS = {
    "llama": "AutoModelForCausalLM",
    "qwen2": "AutoModelForCausalLM",
    "gpt2": "AutoModelForCausalLM",
    "bert": "AutoModelForMaskedLM",
    "bert_base": "AutoModel",
    "vit": "AutoModelForImageClassification",
    "t5": "AutoModelForSeq2SeqLM",
    "mixtral": "AutoModelForCausalLM",
}
TRUST = {"trust_remote_code": True}
SHIM = Path(__file__).parents[2] / "specdef_cli/model/configuration_specdef.py"


def without_package(root: str, work: str) -> None:
    """``import specdef_cli`` raises ImportError from here on."""
    sys.modules["specdef_cli"] = None  # type: ignore[assignment]


def output(model: Any) -> Any:
    with torch.no_grad():
        if model.config.model_type == "vit":
            return model(pixel_values=torch.linspace(-1, 1, 3 * 256, dtype=model.dtype).reshape(1, 3, 16, 16))[0]
        tokens = torch.arange(1, 9)[None]
        decoder = {"decoder_input_ids": tokens} if hasattr(model, "decoder") else {}
        return model(input_ids=tokens, **decoder)[0]


def difference(model: Any, reference: Any) -> float:
    """Largest difference of the outputs, relative to the largest output."""
    expected = output(reference).double()
    return float((output(model).double() - expected).abs().max() / expected.abs().max())


def same(model: Any, reference: Any) -> bool:
    """Whether all tensors are equal bit by bit, and the outputs but for the rounding of kernels.

    The same tensors at another alignment in memory give another last bit, with and without this package.
    """
    ours, theirs = model.state_dict(), reference.state_dict()
    equal = ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)
    return equal and difference(model, reference) < 1e-6


def swapped(model: Any) -> list[str]:
    return [name for name, module in model.named_modules() if type(module).__name__ == "SpecDefLinear"]


def failure(action: Callable[[], Any]) -> str:
    """What was raised, or an empty string."""
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def remote_code(root: str, work: str) -> None:
    """Every family by the directory's own code."""
    _families(root, work, TRUST, *HEADS)


def package_alone(root: str, work: str) -> None:
    """By the package's registration, for files whose names are the model's, for others, and for two stacks."""
    import specdef_cli  # noqa: F401

    _families(root, work, {}, "llama", "vit", "t5")


def _families(root: str, work: str, load: dict[str, Any], *families: str) -> None:
    """Load every family, save it, load that; also without its head, save that, and load it with a head again."""
    import transformers
    from safetensors.torch import load_file

    for family in families:
        auto = getattr(transformers, HEADS[family])
        here, base = f"{root}/{family}", f"{root}/{family}-base"
        native, model = auto.from_pretrained(base), auto.from_pretrained(here, **load)
        assert type(model) is type(native), family
        assert model.config.model_type == native.config.model_type, family
        assert difference(model, native) < 1e-4, family
        names = swapped(model)
        listed = [layer["module"] for layer in json.loads(Path(here, "specdef.json").read_text())["factored"]]
        assert len(names) >= 2, family
        assert sorted(names) == sorted(listed), family
        children = [child for name in names for child in model.get_submodule(name).children()]
        assert all(type(child) is torch.nn.Linear for child in children), family
        traces = [key for key in ("hf_quantizer", "is_quantized", "quantization_method") if hasattr(model, key)]
        assert traces == [], family
        assert not hasattr(model.config, "_is_quantized"), family

        saved = Path(work) / f"{family}-saved"
        model.save_pretrained(saved)
        assert same(model, auto.from_pretrained(saved, **load)), family
        before, after = load_file(f"{here}/model.safetensors"), load_file(saved / "model.safetensors")
        assert before.keys() == after.keys(), family
        assert all(before[key].equal(after[key]) for key in before), family
        config, resaved = (json.loads(Path(at, "config.json").read_text()) for at in (here, saved))
        for volatile in ("dtype", "transformers_version"):
            config.pop(volatile, None), resaved.pop(volatile, None)
        assert config == resaved, family
        assert (saved / "configuration_specdef.py").read_text() == SHIM.read_text(), family

        passed_on = pickle.loads(pickle.dumps(model.config))
        for copy in (deepcopy(model.config), passed_on):
            assert type(copy) is type(model.config), family
            assert copy.to_json_string() == model.config.to_json_string(), family
        assert same(model, auto.from_pretrained(here, config=passed_on, **load)), family

        headless = transformers.AutoModel.from_pretrained(here, **load)
        assert difference(headless, transformers.AutoModel.from_pretrained(base)) < 1e-4, family
        headless.save_pretrained(Path(work) / f"{family}-headless")
        again = auto.from_pretrained(Path(work) / f"{family}-headless", **load)
        assert swapped(again) == names, family
        for name in names:
            pairs = zip(*(of.get_submodule(name).parameters() for of in (again, model)), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs), (family, name)


def usage(root: str, work: str) -> None:
    """What people do with a model: dtypes, devices, generation, pipelines, heads."""
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        T5EncoderModel,
        pipeline,
    )

    here, base = f"{root}/llama", f"{root}/llama-base"
    native = AutoModelForCausalLM.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(here, **TRUST)

    half = AutoModelForCausalLM.from_pretrained(here, dtype=torch.bfloat16, **TRUST)
    assert {tensor.dtype for tensor in half.state_dict().values()} == {torch.bfloat16}
    assert deepcopy(model).half().model.layers[0].self_attn.o_proj.inflated.weight.dtype == torch.float16
    assert difference(deepcopy(model).to(torch.float64), native) < 1e-4
    for device_map in ("cpu", "auto"):
        assert same(AutoModelForCausalLM.from_pretrained(here, device_map=device_map, **TRUST), model)
    split: dict[str, str] = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    split |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    for name, layers in (("split", split), ("disk", {"": "disk"})):
        offloaded = AutoModelForCausalLM.from_pretrained(
            here, device_map=layers, offload_folder=f"{work}/{name}", **TRUST
        )
        assert difference(offloaded, model) < 1e-6, name  # its tensors are not here to compare

    generate = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    text = "w3 w4 w5"
    made, plain = pipeline("text-generation", model=here, **TRUST), pipeline("text-generation", model=base)
    assert made(text, **generate) == plain(text, **generate)
    assert len(swapped(made.model)) == 4
    assert AutoTokenizer.from_pretrained(here, **TRUST)(text)["input_ids"] == [3, 4, 5]

    for family, count in (("bert_base", 2), ("llama", 4)):
        classifier = AutoModelForSequenceClassification.from_pretrained(f"{root}/{family}", num_labels=5, **TRUST)
        classifier.config.pad_token_id = 0
        classifier.save_pretrained(f"{work}/{family}-classifier")
        again = AutoModelForSequenceClassification.from_pretrained(f"{work}/{family}-classifier", **TRUST)
        assert (len(swapped(classifier)), list(output(classifier).shape)) == (count, [1, 5])
        assert same(classifier, again), family
    # An encoder alone lacks half of the layers. T5 reads `wo.weight.dtype`, and keeps `wo` in float32.
    config = AutoConfig.from_pretrained(f"{root}/t5", **TRUST)
    encoder = T5EncoderModel.from_pretrained(f"{root}/t5", config=config, dtype=torch.float16)
    assert swapped(encoder) == [f"encoder.block.{block}.layer.1.DenseReluDense.wo" for block in (0, 1)]
    wo = encoder.encoder.block[0].layer[1].DenseReluDense.wo
    assert {tensor.dtype for tensor in wo.state_dict().values()} == {torch.float32}
    assert difference(encoder, T5EncoderModel.from_pretrained(f"{root}/t5-base", dtype=torch.float16)) < 0.05

    merged = deepcopy(model.config)
    del merged.quantization_config
    merged.save_pretrained(f"{work}/merged")
    assert merged.to_dict()["model_type"] == json.loads(merged.to_json_string())["model_type"] == "llama"
    assert [path.name for path in Path(work, "merged").iterdir()] == ["config.json"]

    model.save_pretrained(f"{work}/sharded", max_shard_size="20KB")
    assert len(list(Path(work, "sharded").glob("*.safetensors"))) > 1
    assert same(AutoModelForCausalLM.from_pretrained(f"{work}/sharded", **TRUST), model)


def training(root: str, work: str) -> None:
    """PEFT, and a full fine-tuning run whose checkpoint is loaded again and resumed from."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    here = f"{root}/llama"
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(here, **TRUST),
        LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    found = {name.split(".layers.0.")[1] for name, _ in adapted.named_modules() if ".layers.0." in name}
    attention = ["k_proj", "o_proj.compensation", "o_proj.inflated", "q_proj", "v_proj"]
    mlp = ["down_proj.compensation", "down_proj.inflated", "gate_proj", "up_proj"]
    assert {name.removesuffix(".lora_A") for name in found if name.endswith("lora_A")} == {
        *(f"self_attn.{name}" for name in attention),
        *(f"mlp.{name}" for name in mlp),
    }
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    adapted.save_pretrained(f"{work}/adapter")
    reloaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(here, **TRUST), f"{work}/adapter")
    assert same(adapted, reloaded)
    defaults = get_peft_model(AutoModelForCausalLM.from_pretrained(here, **TRUST), LoraConfig(r=2))
    assert defaults.peft_config["default"].target_modules == {"q_proj", "v_proj"}

    model = AutoModelForCausalLM.from_pretrained(here, **TRUST)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    torch.manual_seed(0)
    data = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 64, (8, 12))]
    arguments: dict[str, Any] = {
        "output_dir": f"{work}/trainer", "max_steps": 2, "save_steps": 2, "per_device_train_batch_size": 4,
        "learning_rate": 1e-3, "report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_strategy": "no",
    }  # fmt: skip
    Trainer(model=model, args=TrainingArguments(**arguments), train_dataset=data).train()
    for name, parameter in model.named_parameters():
        if name.endswith(("inflated.weight", "compensation.weight")):
            assert not torch.equal(parameter, start[name]), name
    checkpoint = f"{work}/trainer/checkpoint-2"
    again = AutoModelForCausalLM.from_pretrained(checkpoint, **TRUST)
    assert len(swapped(again)) == 4
    assert same(again, model.eval())
    fresh = AutoModelForCausalLM.from_pretrained(here, **TRUST)
    arguments |= {"max_steps": 4, "save_strategy": "no"}
    resumed = Trainer(model=fresh, args=TrainingArguments(**arguments), train_dataset=data)
    resumed.train(resume_from_checkpoint=checkpoint)
    assert resumed.state.global_step == 4


def registered_twice(root: str, work: str) -> None:
    """A directory's own code first, then the package, in one process; and the other way round."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    here = f"{root}/llama"
    model = AutoModelForCausalLM.from_pretrained(here, **TRUST)
    config = AutoConfig.from_pretrained(here, **TRUST)
    assert "specdef_cli" not in sys.modules
    assert AUTO_QUANTIZER_MAPPING["specdef"].__module__.startswith("transformers_modules.")

    import specdef_cli  # noqa: F401
    from specdef_cli.model import SpecDefLinear

    assert AUTO_QUANTIZER_MAPPING["specdef"].__module__ == "specdef_cli.model.configuration_specdef"
    packaged = AutoModelForCausalLM.from_pretrained(here)
    mixed = AutoModelForCausalLM.from_pretrained(here, config=config)  # their config, our hook
    trusted = AutoModelForCausalLM.from_pretrained(here, **TRUST)
    assert [same(model, other) for other in (packaged, mixed, trusted)] == [True] * 3
    assert all(isinstance(other.model.layers[0].mlp.down_proj, SpecDefLinear) for other in (packaged, mixed))
    assert pickle.loads(pickle.dumps(mixed.config)).model_type == "llama"
    for saved in (mixed, model):  # the second was loaded by the directory's code before the package came
        saved.save_pretrained(f"{work}/again")
        assert same(model, AutoModelForCausalLM.from_pretrained(f"{work}/again"))


def native_class(root: str, work: str) -> None:
    """The explicit native class, with the package imported: it asks for no model_type, but it finds the hook."""
    import specdef_cli  # noqa: F401

    # isort: split
    # In this order modeling_utils imports the registries while it is being imported itself.
    from transformers.models.llama.modeling_llama import LlamaForCausalLM

    native = LlamaForCausalLM.from_pretrained(f"{root}/llama-base")
    model = LlamaForCausalLM.from_pretrained(f"{root}/llama")
    assert difference(model, native) < 1e-4
    model.save_pretrained(f"{work}/explicit")
    assert model.config.model_type == "llama"
    assert json.loads(Path(work, "explicit", "config.json").read_text())["model_type"] == "specdef"
    from transformers import AutoModelForCausalLM

    assert difference(AutoModelForCausalLM.from_pretrained(f"{work}/explicit"), native) < 1e-4


def strangers(root: str, work: str) -> None:
    """Without the package and without running the directory's code nothing loads, for the right reason."""
    import transformers

    untrusted: list[Callable[[], Any]] = [
        lambda: transformers.AutoConfig.from_pretrained(f"{root}/llama"),
        lambda: transformers.pipeline("text-generation", model=f"{root}/llama"),
    ]
    for family, head in HEADS.items():
        load = partial(getattr(transformers, head).from_pretrained, f"{root}/{family}")
        untrusted += [load, partial(load, trust_remote_code=False)]
    for action in untrusted:
        raised = failure(action)
        assert "custom code" in raised, (action, raised)
    for family, name in (
        ("llama", "LlamaForCausalLM"),
        ("llama", "LlamaModel"),
        ("qwen2", "Qwen2ForCausalLM"),
        ("gpt2", "GPT2LMHeadModel"),
        ("bert", "BertForMaskedLM"),
        ("bert_base", "BertModel"),
        ("vit", "ViTForImageClassification"),
        ("t5", "T5ForConditionalGeneration"),
        ("t5", "T5EncoderModel"),
        ("mixtral", "MixtralForCausalLM"),
    ):
        raised = failure(partial(getattr(transformers, name).from_pretrained, f"{root}/{family}"))
        assert "size" in raised or "shape" in raised, (name, raised)  # a tombstone where a weight belongs


def damaged(root: str, work: str) -> None:
    """Directories whose files and config disagree, each with the Auto class that is to load it and what it says."""
    import transformers

    for at in Path(work, "damaged").iterdir():
        head, message = json.loads((at / "expected.json").read_text())
        raised = failure(partial(getattr(transformers, head).from_pretrained, at, **TRUST))
        assert raised.startswith("SpecDefLoadError"), (at.name, raised)
        assert message in raised, (at.name, raised)
    load = partial(transformers.AutoModelForCausalLM.from_pretrained, f"{work}/damaged/wrong shape", **TRUST)
    assert "has shape [96, 32]" in failure(partial(load, ignore_mismatched_sizes=True))

    def from_state_dict() -> None:  # no files to check: what is missing shows only after loading
        config = transformers.AutoConfig.from_pretrained(f"{root}/llama", **TRUST)
        state = transformers.AutoModelForCausalLM.from_pretrained(f"{root}/llama", **TRUST).state_dict()
        del state["model.layers.1.mlp.down_proj.compensation.weight"]
        transformers.LlamaForCausalLM.from_pretrained(None, config=config, state_dict=state)

    assert "model.layers.1.mlp.down_proj.compensation.weight was not loaded" in failure(from_state_dict)


def ending(name: str, given: dict[str, str]) -> str:
    try:
        globals()[name](**given)
    except Exception:
        return traceback.format_exc()
    return ""


if __name__ == "__main__":
    print("\n" + json.dumps({name: ending(name, given) for name, given in json.loads(sys.argv[1]).items()}))
