"""Directories of safetensors: found, read lazily, rewritten as a stream, published whole or not at all."""
