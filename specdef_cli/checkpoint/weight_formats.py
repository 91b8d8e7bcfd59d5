"""Files that hold weights in another format than safetensors, by their suffix."""

from __future__ import annotations

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
"""Loading one runs code."""
OTHER_FORMATS = (".h5", ".msgpack", ".onnx", ".onnx_data", ".gguf", ".ggml", ".tflite", ".mlmodel", ".npz")
