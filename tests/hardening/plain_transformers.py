"""A program of its own: do pairs of directories compute the same, for transformers without this package?

Reads a JSON list of ``{"name", "base", "folded", "dtype"}`` from stdin, where ``"code": true`` lets the code that comes
with a directory run, and prints a JSON object of name → differences.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.modules["specdef_cli"] = None  # type: ignore[assignment]  # no import finds it from here on

import torch
import transformers

VOCABULARY = 96


def outputs(directory: str | Path, dtype: str, *, code: bool = False, generate: bool = True) -> dict[str, torch.Tensor]:
    """Logits (or the last hidden state) by attention implementation, and a greedy generation."""
    architecture = json.loads((Path(directory) / "config.json").read_text())["architectures"][0]
    model_class = getattr(transformers, architecture)
    given = {"config": transformers.AutoConfig.from_pretrained(directory, trust_remote_code=True)} if code else {}
    model, loading = model_class.from_pretrained(
        directory, dtype=getattr(torch, dtype), attn_implementation="eager", output_loading_info=True, **given
    )
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), loading
    generator = torch.Generator().manual_seed(1)
    if model.main_input_name == "pixel_values":
        inputs = {"pixel_values": torch.randn((2, 3, 16, 16), generator=generator).to(model.dtype)}
    else:
        ids = torch.randint(3, VOCABULARY, (2, 13), generator=generator)
        mask = torch.ones_like(ids)
        if "Classification" not in architecture:
            ids[1, -3:], mask[1, -3:] = 0, 0  # a padded row
        inputs = {"input_ids": ids, "attention_mask": mask}
    prompt = dict(inputs)
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.randint(3, VOCABULARY, (2, 7), generator=generator)
    results = {}
    with torch.inference_mode():
        for attention in ("eager", "sdpa") if model._supports_sdpa else ("eager",):
            model.set_attn_implementation(attention)
            found = model.eval()(**inputs)
            results[attention] = found["logits"] if "logits" in found else found["last_hidden_state"]
            assert torch.isfinite(results[attention]).all()
        if generate and model.can_generate():
            results["generation"] = model.generate(**prompt, max_new_tokens=4, do_sample=False)
    return results


def main() -> None:
    """Compare every pair."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    bases: dict[tuple[str, str], dict[str, torch.Tensor]] = {}
    found: dict[str, dict[str, list[str]]] = {}
    for job in json.load(sys.stdin):
        key = (job["base"], job["dtype"])
        if key not in bases:
            bases[key] = outputs(*key)
        folded = outputs(job["folded"], job["dtype"], code=job.get("code", False))
        assert folded.keys() == bases[key].keys()
        different = [what for what, value in folded.items() if not torch.equal(value, bases[key][what])]
        found[job["name"]] = {"compared": sorted(folded), "different": different}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
