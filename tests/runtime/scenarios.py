"""What a stranger's process does with hardened directories. Run as a script; the scenarios are run in their order.

    python scenarios.py '{"<scenario>": {<arguments>}, …}'   →   one JSON object on the last line of stdout

With ``without_package`` first, ``specdef_cli`` cannot be imported here, wherever it is installed.
"""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

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


def without_package(root: str, work: str) -> None:
    """``import specdef_cli`` raises ImportError from here on."""
    sys.modules["specdef_cli"] = None  # type: ignore[assignment]


def output(model: Any) -> Any:
    import torch

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


# --- scenarios -----------------------------------------------------------------------------------------------------


def remote_code(root: str, work: str) -> dict[str, Any]:
    """Every family by the directory's own code."""
    return _families(root, work, TRUST, *HEADS)


def package_alone(root: str, work: str) -> dict[str, Any]:
    """By the package's registration, for files whose names are the model's, for others, and for two stacks."""
    import specdef_cli  # noqa: F401

    return _families(root, work, {}, "llama", "vit", "t5")


def _families(root: str, work: str, load: dict[str, Any], *families: str) -> dict[str, Any]:
    """Load every family, save it, load that; also without its head, save that, and load it with a head again."""
    import torch
    import transformers
    from safetensors.torch import load_file
    from torch import nn

    results = {}
    for family in families:
        auto = getattr(transformers, HEADS[family])
        here, base = f"{root}/{family}", f"{root}/{family}-base"
        native, model = auto.from_pretrained(base), auto.from_pretrained(here, **load)
        names = swapped(model)
        result: dict[str, Any] = {
            "type": f"{type(model).__module__}.{type(model).__name__}",
            "native": type(model) is type(native) and model.config.model_type == native.config.model_type,
            "difference": difference(model, native),
            "swapped": sorted(names),
            "plain_linears": all(
                type(child) is nn.Linear for name in names for child in model.get_submodule(name).children()
            ),
            "traces": [key for key in ("hf_quantizer", "is_quantized", "quantization_method") if hasattr(model, key)]
            + [key for key in ("_is_quantized",) if hasattr(model.config, key)],
        }

        saved = Path(work) / f"{family}-saved"
        model.save_pretrained(saved)
        again = auto.from_pretrained(saved, **load)
        before, after = load_file(f"{here}/model.safetensors"), load_file(saved / "model.safetensors")
        result["same_tensors"] = before.keys() == after.keys() and all(before[key].equal(after[key]) for key in before)
        result["same_output"] = same(model, again)
        config, resaved = (json.loads(Path(at, "config.json").read_text()) for at in (here, saved))
        volatile = ("dtype", "transformers_version")
        result["config_difference"] = sorted(
            key for key in config.keys() | resaved.keys() if key not in volatile and config.get(key) != resaved.get(key)
        )
        result["code"] = (saved / "configuration_specdef.py").read_text()

        copies = {"deepcopy": deepcopy(model.config), "pickle": pickle.loads(pickle.dumps(model.config))}
        result["copies"] = [
            name
            for name, copy in copies.items()
            if type(copy) is not type(model.config) or copy.to_json_string() != model.config.to_json_string()
        ]
        passed_on = auto.from_pretrained(here, config=copies["pickle"], **load)
        result["config_passed_on"] = same(model, passed_on)

        headless, native_headless = (
            transformers.AutoModel.from_pretrained(here, **load),
            transformers.AutoModel.from_pretrained(base),
        )
        result["headless_difference"] = difference(headless, native_headless)
        headless.save_pretrained(Path(work) / f"{family}-headless")
        head_again = auto.from_pretrained(Path(work) / f"{family}-headless", **load)
        result["head_again"] = sorted(swapped(head_again))
        result["head_again_equal"] = all(
            torch.equal(a, b)
            for name in swapped(head_again)
            for a, b in zip(
                head_again.get_submodule(name).parameters(), model.get_submodule(name).parameters(), strict=True
            )
        )
        results[family] = result
    return results


def usage(root: str, work: str) -> dict[str, Any]:
    """What people do with a model: dtypes, devices, generation, pipelines, heads."""
    import torch
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
    result: dict[str, Any] = {}

    half = AutoModelForCausalLM.from_pretrained(here, dtype=torch.bfloat16, **TRUST)
    result["bfloat16"] = sorted({str(tensor.dtype) for tensor in half.state_dict().values()})
    result["half"] = str(deepcopy(model).half().model.layers[0].self_attn.o_proj.inflated.weight.dtype)
    result["double_difference"] = difference(deepcopy(model).to(torch.float64), native)
    for device_map in ("cpu", "auto"):
        placed = AutoModelForCausalLM.from_pretrained(here, device_map=device_map, **TRUST)
        result[f"device_map_{device_map}"] = same(placed, model)
    split: dict[str, str] = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    split |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    for name, layers in (("split", split), ("disk", {"": "disk"})):
        offloaded = AutoModelForCausalLM.from_pretrained(
            here, device_map=layers, offload_folder=f"{work}/{name}", **TRUST
        )
        result[f"device_map_{name}"] = difference(offloaded, model) < 1e-6  # its tensors are not here to compare

    prompt = torch.arange(3, 9)[None]
    generate = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    result["generate"] = torch.equal(model.generate(prompt, **generate), native.generate(prompt, **generate))
    text = "w3 w4 w5"
    make = pipeline("text-generation", model=here, **TRUST)
    plain = pipeline("text-generation", model=base)
    result["pipeline"] = make(text, **generate) == plain(text, **generate)
    result["pipeline_swapped"] = len(swapped(make.model))
    result["tokenizer"] = AutoTokenizer.from_pretrained(here, **TRUST)(text)["input_ids"]

    for family in ("bert_base", "llama"):
        classifier = AutoModelForSequenceClassification.from_pretrained(f"{root}/{family}", num_labels=5, **TRUST)
        classifier.config.pad_token_id = 0
        classifier.save_pretrained(f"{work}/{family}-classifier")
        again = AutoModelForSequenceClassification.from_pretrained(f"{work}/{family}-classifier", **TRUST)
        result[f"{family}_classifier"] = {
            "swapped": len(swapped(classifier)),
            "shape": list(output(classifier).shape),
            "round_trip": same(classifier, again),
        }
    # An encoder alone lacks half of the layers. T5 reads `wo.weight.dtype`, and keeps `wo` in float32.
    config = AutoConfig.from_pretrained(f"{root}/t5", **TRUST)
    encoder = T5EncoderModel.from_pretrained(f"{root}/t5", config=config, dtype=torch.float16)
    wo = encoder.encoder.block[0].layer[1].DenseReluDense.wo
    result["encoder"] = {
        "swapped": swapped(encoder),
        "dtypes": sorted({str(tensor.dtype) for tensor in wo.state_dict().values()}),
        "difference": difference(encoder, T5EncoderModel.from_pretrained(f"{root}/t5-base", dtype=torch.float16)),
    }

    merged = deepcopy(model.config)
    del merged.quantization_config
    merged.save_pretrained(f"{work}/merged")
    result["merged"] = [merged.to_dict()["model_type"], json.loads(merged.to_json_string())["model_type"]]
    result["merged_files"] = sorted(path.name for path in Path(work, "merged").iterdir())

    model.save_pretrained(f"{work}/sharded", max_shard_size="20KB")
    result["shards"] = len(list(Path(work, "sharded").glob("*.safetensors")))
    sharded = AutoModelForCausalLM.from_pretrained(f"{work}/sharded", **TRUST)
    result["sharded"] = same(sharded, model)
    return result


def training(root: str, work: str) -> dict[str, Any]:
    """PEFT, and a full fine-tuning run whose checkpoint is loaded again and resumed from."""
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    here = f"{root}/llama"
    result: dict[str, Any] = {}

    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(here, **TRUST),
        LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    result["all_linear"] = sorted(
        {name.split(".layers.0.")[1].removesuffix(".lora_A") for name, _ in adapted.named_modules() if "lora_A" in name
         and ".layers.0." in name and name.endswith("lora_A")}
    )  # fmt: skip
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    adapted.save_pretrained(f"{work}/adapter")
    reloaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(here, **TRUST), f"{work}/adapter")
    result["adapter_round_trip"] = same(adapted, reloaded)
    defaults = get_peft_model(AutoModelForCausalLM.from_pretrained(here, **TRUST), LoraConfig(r=2))
    result["default_targets"] = sorted(defaults.peft_config["default"].target_modules)

    model = AutoModelForCausalLM.from_pretrained(here, **TRUST)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    torch.manual_seed(0)
    data = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 64, (8, 12))]
    arguments: dict[str, Any] = {
        "output_dir": f"{work}/trainer", "max_steps": 2, "save_steps": 2, "per_device_train_batch_size": 4,
        "learning_rate": 1e-3, "report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_strategy": "no",
    }  # fmt: skip
    Trainer(model=model, args=TrainingArguments(**arguments), train_dataset=data).train()
    factors = ("inflated.weight", "compensation.weight")
    result["trained"] = all(
        not torch.equal(parameter, start[name])
        for name, parameter in model.named_parameters()
        if name.endswith(factors)
    )
    checkpoint = f"{work}/trainer/checkpoint-2"
    again = AutoModelForCausalLM.from_pretrained(checkpoint, **TRUST)
    result["checkpoint_swapped"] = len(swapped(again))
    result["checkpoint_equal"] = same(again, model.eval())
    arguments |= {"max_steps": 4, "save_strategy": "no"}
    resumed = Trainer(
        model=AutoModelForCausalLM.from_pretrained(here, **TRUST),
        args=TrainingArguments(**arguments),
        train_dataset=data,
    )
    resumed.train(resume_from_checkpoint=checkpoint)
    result["resumed_steps"] = resumed.state.global_step
    return result


def registered_twice(root: str, work: str) -> dict[str, Any]:
    """A directory's own code first, then the package, in one process; and the other way round."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    here = f"{root}/llama"
    model = AutoModelForCausalLM.from_pretrained(here, **TRUST)
    config = AutoConfig.from_pretrained(here, **TRUST)
    result: dict[str, Any] = {"package_imported_before": "specdef_cli" in sys.modules}
    first = AUTO_QUANTIZER_MAPPING["specdef"].__module__

    import specdef_cli  # noqa: F401
    from specdef_cli.model import SpecDefLinear

    result["hooks"] = [first.split(".")[0], AUTO_QUANTIZER_MAPPING["specdef"].__module__]
    packaged = AutoModelForCausalLM.from_pretrained(here)
    mixed = AutoModelForCausalLM.from_pretrained(here, config=config)  # their config, our hook
    trusted = AutoModelForCausalLM.from_pretrained(here, **TRUST)
    result["equal"] = [same(model, other) for other in (packaged, mixed, trusted)]
    result["ours"] = [isinstance(other.model.layers[0].mlp.down_proj, SpecDefLinear) for other in (packaged, mixed)]
    mixed.save_pretrained(f"{work}/mixed")
    model.save_pretrained(f"{work}/first")  # loaded by the directory's code before the package came
    result["pickles"] = pickle.loads(pickle.dumps(mixed.config)).model_type
    result["saved"] = [
        same(model, AutoModelForCausalLM.from_pretrained(f"{work}/{name}")) for name in ("mixed", "first")
    ]
    return result


def native_class(root: str, work: str) -> dict[str, Any]:
    """The explicit native class, with the package imported: it asks for no model_type, but it finds the hook."""
    import specdef_cli  # noqa: F401

    # isort: split
    # In this order modeling_utils imports the registries while it is being imported itself.
    from transformers.models.llama.modeling_llama import LlamaForCausalLM

    native = LlamaForCausalLM.from_pretrained(f"{root}/llama-base")
    model = LlamaForCausalLM.from_pretrained(f"{root}/llama")
    model.save_pretrained(f"{work}/explicit")
    config = json.loads(Path(work, "explicit", "config.json").read_text())
    from transformers import AutoModelForCausalLM

    again = AutoModelForCausalLM.from_pretrained(f"{work}/explicit")
    return {
        "difference": difference(model, native),
        "model_type": model.config.model_type,
        "saved_model_type": config["model_type"],
        "again": difference(again, native),
    }


def strangers(root: str, work: str) -> dict[str, Any]:
    """Without the package and without running the directory's code, nothing may load."""
    import transformers

    result = {}
    for family, head in HEADS.items():
        auto = getattr(transformers, head)
        result[f"{family} {head}"] = failure(partial(auto.from_pretrained, f"{root}/{family}"))
        result[f"{family} untrusted"] = failure(
            partial(auto.from_pretrained, f"{root}/{family}", trust_remote_code=False)
        )
    result["config"] = failure(lambda: transformers.AutoConfig.from_pretrained(f"{root}/llama"))
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
        native = getattr(transformers, name)
        result[f"{family} {name}"] = failure(partial(native.from_pretrained, f"{root}/{family}"))
    result["pipeline"] = failure(lambda: transformers.pipeline("text-generation", model=f"{root}/llama"))
    return result


def damaged(root: str, work: str) -> dict[str, Any]:
    """Directories whose files and config disagree, below the name of the Auto class that is to load them."""
    import transformers

    result = {}
    for at in Path(work).glob("AutoModel*/*"):
        result[at.name] = failure(partial(getattr(transformers, at.parent.name).from_pretrained, at, **TRUST))
    result["ignored mismatch"] = failure(
        lambda: transformers.AutoModelForCausalLM.from_pretrained(
            f"{work}/AutoModelForCausalLM/wrong shape", ignore_mismatched_sizes=True, **TRUST
        )
    )

    def from_state_dict() -> None:
        # No files to check: what is missing shows only after loading.
        config = transformers.AutoConfig.from_pretrained(f"{root}/llama", **TRUST)
        state = transformers.AutoModelForCausalLM.from_pretrained(f"{root}/llama", **TRUST).state_dict()
        del state["model.layers.1.mlp.down_proj.compensation.weight"]
        transformers.LlamaForCausalLM.from_pretrained(None, config=config, state_dict=state)

    result["state dict"] = failure(from_state_dict)
    return result


def lazy(root: str, work: str) -> dict[str, Any]:
    """``import specdef_cli`` is cheap."""
    import specdef_cli

    heavy = [name for name in ("torch", "transformers", "numpy", "safetensors") if name in sys.modules]
    return {"heavy": heavy, "version": specdef_cli.__version__, "error": specdef_cli.SpecDefError.__module__}


if __name__ == "__main__":
    print("\n" + json.dumps({name: globals()[name](**given) for name, given in json.loads(sys.argv[1]).items()}))
