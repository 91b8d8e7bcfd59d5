"""What runs inside llama.cpp, as a program of its own: a failed assertion there ends the process.

    python -P llamacpp_worker.py quantize IN.gguf OUT.gguf Q4_K_M
    python -P llamacpp_worker.py loss MODEL.gguf TOKENS.npy f16 on

It imports neither this package nor torch, so that it starts at once. ``loss`` prints one JSON object.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys


def quantize(source: str, target: str, kind: str) -> None:
    """``llama-quantize``: a float32 GGUF file in another type."""
    import llama_cpp

    names = {"F32": "LLAMA_FTYPE_ALL_F32"}
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, names.get(kind, f"LLAMA_FTYPE_MOSTLY_{kind}"))
    parameters.nthread = threads()
    if llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(parameters)):
        sys.exit(1)  # it has said why


def loss(model: str, tokens: str, cache: str, flash_attention: str) -> None:
    """Print the mean next-token cross-entropy in nats of sequences, shape [sequences, length]."""
    import llama_cpp
    import numpy as np

    types = {"f16": 1, "f32": 0}  # enum ggml_type
    sequences = np.load(tokens)
    length = sequences.shape[1]
    llama = llama_cpp.Llama(
        model, n_ctx=length, n_batch=length, n_ubatch=length, n_gpu_layers=0, logits_all=True, verbose=False,
        n_threads=threads(), n_threads_batch=threads(),
        flash_attn=flash_attention == "on", type_k=types[cache], type_v=types[cache],
    )  # fmt: skip
    total = 0.0
    for sequence in sequences:
        llama.reset()
        llama.eval(sequence.tolist())
        logits = llama.scores[: length - 1].astype(np.float64)
        highest = logits.max(-1, keepdims=True)
        normalizers = np.log(np.exp(logits - highest).sum(-1)) + highest[:, 0]
        total += float((normalizers - logits[np.arange(length - 1), sequence[1:]]).mean())
    print(json.dumps({"loss": total / len(sequences)}))


def threads() -> int:
    """As many as there are cores, or as OpenMP is told to take, so that several of these can share a machine."""
    return int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)


if __name__ == "__main__":
    if sys.argv[1] == "quantize":
        quantize(*sys.argv[2:])
    else:
        loss(*sys.argv[2:])
