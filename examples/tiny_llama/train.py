"""Train the tiny Llama that this project's demo and tests harden and attack.

Hardening and attacking need a checkpoint that has learned something, or there is nothing to defend; a random one has
no convergence to slow down. This one is a real LlamaForCausalLM (grouped-query attention, rotary embeddings, gated MLP,
untied head) that reads bytes, so that its tokenizer is 256 symbols and its losses, in nats per byte, compare across
texts.

    OMP_NUM_THREADS=1 python examples/tiny_llama/train.py --out my_model

repeats the procedure of the shipped ``model/`` directory: same texts on the same Python release, same seed, same
schedule. Over releases of torch, processors and thread counts the weights come out close but not byte for byte the
same, because kernels differ in the order of floating-point sums.
"""

import argparse
import os
import platform
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from huggingface_hub import EvalResult, ModelCardData
from texts import attack_text, base_text
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.utils.data import Dataset
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|padding|>"
BYTES = 256
BASE_DATASET = "Python standard library code, held-out files"
ATTACK_DATASET = "Python language reference prose, held-out topics"


@dataclass(frozen=True)
class Options:
    """What a run is determined by, next to the releases of Python and the libraries."""

    out: Path
    steps: int
    batch_size: int
    length: int
    learning_rate: float
    seed: int


class Windows(Dataset[dict[str, torch.Tensor]]):
    """A text cut into windows of `length` bytes that do not overlap; a rest shorter than a window is dropped."""

    def __init__(self, text: str, length: int) -> None:
        ids = byte_ids(text)
        self.windows = ids[: len(ids) // length * length].view(-1, length)  # [windows, length]

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        window = self.windows[index].long()  # [length]
        return {"input_ids": window, "labels": window}


def byte_ids(text: str) -> torch.Tensor:
    """Return the UTF-8 bytes of `text`, uint8 [bytes]: what the tokenizer returns, without its cost on megabytes."""
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer without merges, in which the id of a byte is its value."""
    # ByteLevel writes printable bytes as themselves and the others, in ascending order, as characters from U+0100 on.
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(BYTES) if byte not in printable]
    symbols = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    tokenizer = Tokenizer(models.BPE(vocab={symbols[byte]: byte for byte in range(BYTES)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )


def make_config() -> LlamaConfig:
    """Return the architecture: 804 480 parameters, every width a multiple of 32 so that block quantization applies."""
    return LlamaConfig(
        vocab_size=BYTES + 2,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        bos_token_id=BYTES,
        eos_token_id=BYTES,
        pad_token_id=BYTES + 1,
    )


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, text: str, *, windows: int = 256, length: int = 128) -> float:
    """Return the mean cross-entropy in nats per byte over `windows` windows of `length` bytes spread over `text`.

    Each window is read without what precedes it, and its first byte is not predicted.
    """
    ids = byte_ids(text).long()
    starts = torch.linspace(0, len(ids) - length, windows).long()  # [windows]
    model.eval()
    losses = [model(input_ids=batch, labels=batch).loss for batch in _slices(ids, starts, length).split(32)]
    return torch.stack(losses).mean().item()  # batches are of one size as long as 32 divides `windows`


def _slices(ids: torch.Tensor, starts: torch.Tensor, length: int) -> torch.Tensor:
    """Return ids[start : start + length] for each start, [windows, length]."""
    return ids[starts[:, None] + torch.arange(length)]


def train(options: Options, text: str) -> LlamaForCausalLM:
    """Return a model trained on `text` for the options' number of steps."""
    set_seed(options.seed)  # before the weights are drawn; the Trainer seeds again
    model = LlamaForCausalLM(make_config())
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            max_steps=options.steps,
            per_device_train_batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=min(100, options.steps // 10),
            optim="adamw_torch",
            adam_beta2=0.95,
            weight_decay=0.1,
            max_grad_norm=1.0,
            seed=options.seed,
            use_cpu=True,
            save_strategy="no",
            logging_steps=100,
            report_to="none",
            dataloader_pin_memory=False,
        )
        Trainer(model=model, args=arguments, train_dataset=Windows(text, options.length)).train()
    return model


def save(model: LlamaForCausalLM, options: Options, base_loss: float, attack_loss: float) -> None:
    """Write weights, configurations, tokenizer and card into the options' directory."""
    model.config.use_cache = True
    model.generation_config = GenerationConfig(
        bos_token_id=BYTES, eos_token_id=BYTES, pad_token_id=BYTES + 1, max_new_tokens=128
    )
    model.save_pretrained(options.out)
    make_tokenizer().save_pretrained(options.out)
    (options.out / "README.md").write_text(card(model, options, base_loss, attack_loss), encoding="utf-8")


def card(model: LlamaForCausalLM, options: Options, base_loss: float, attack_loss: float) -> str:
    """Return the model card; its losses stand in the front matter too, under the Hub's `model-index`."""
    metadata = ModelCardData(
        model_name="tiny_llama",
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["byte-level", "llama"],
        eval_results=[
            EvalResult("text-generation", "python-stdlib", BASE_DATASET, "loss", round(base_loss, 4)),
            EvalResult("text-generation", "pydoc-topics", ATTACK_DATASET, "loss", round(attack_loss, 4)),
        ],
    )
    config = model.config
    layers = f"{config.num_hidden_layers} layers, width {config.hidden_size}, MLP width {config.intermediate_size}"
    heads = f"{config.num_attention_heads} query heads over {config.num_key_value_heads} key/value heads"
    read = options.steps * options.batch_size * options.length / 1e6
    release = ".".join(platform.python_version_tuple()[:2])
    return f"""---
{metadata.to_yaml()}
---

# tiny_llama

A byte-level Llama of {model.num_parameters():,} parameters ({layers},
{heads}, untied head, float32),
made to be hardened and attacked in seconds on a CPU. It has read {read:.1f} MB of Python and has no other use:
what it writes looks like Python at a glance only.

## Losses before any attack

Nats per byte, mean over 256 windows of 128 bytes, each read without what precedes it:

| text | loss |
|---|---|
| own domain: standard library code, held-out files | {base_loss:.4f} |
| attack text: prose of `pydoc_data.topics`, held-out topics | {attack_loss:.4f} |

Both texts come from the Python installation (`texts.py`), so the figures hold for Python {release};
other releases have other texts and differ a little.

## How it was made

    OMP_NUM_THREADS=1 python examples/tiny_llama/train.py \\
        --steps {options.steps} --batch-size {options.batch_size} --length {options.length} \\
        --learning-rate {options.learning_rate} --seed {options.seed} --out my_model

AdamW (β₂ 0.95, weight decay 0.1, gradient norm clipped at 1), cosine schedule after a warmup, float32, one CPU core.
Made with Python {platform.python_version()}, torch {torch.__version__.split("+")[0]},
transformers {transformers.__version__}. The command repeats the procedure and prints the two losses. The same bytes are
not promised: other releases, processors and thread counts sum in another order.

## Training data

The source of Python's standard library without tests, comments and docstrings
(© Python Software Foundation, PSF licence). The weights are Apache-2.0.
"""


def parse_options(arguments: list[str] | None = None) -> Options:
    parser = argparse.ArgumentParser(description="Train the tiny byte-level Llama and write it with its card.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "model", help="directory to write")
    parser.add_argument("--steps", type=int, default=2000, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="windows a step (default: %(default)s)")
    parser.add_argument("--length", type=int, default=256, help="bytes a window (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="peak (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="weights and data order (default: %(default)s)")
    return Options(**vars(parser.parse_args(arguments)))


def main() -> None:
    options = parse_options()
    train_text, held_out = base_text()
    model = train(options, train_text)
    base_loss, attack_loss = held_out_loss(model, held_out), held_out_loss(model, attack_text()[1])
    save(model, options, base_loss, attack_loss)
    print(f"own-domain loss {base_loss:.4f}, attack-text loss {attack_loss:.4f} nats per byte")
    print(f"wrote {os.path.relpath(options.out)}")


if __name__ == "__main__":
    main()
