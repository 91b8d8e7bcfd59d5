"""A model without weights: the same from a directory, from a config and from the model itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers

from specdef_cli.checkpoint.reader import open_checkpoint
from specdef_cli.model.sites import linear_sites
from specdef_cli.model.skeleton import Skeleton
from specdef_cli.model.symmetries import symmetric_pairs, symmetries
from tests.tiny_families import CASES, skeleton_of


@pytest.mark.parametrize("case", ["llama", "qwen3-tied", "vit", "mixtral", "t5-untied", "bert"])
def test_a_directory_a_config_and_a_model_in_memory_agree(checkpoints: dict[str, Path], case: str) -> None:
    directory = checkpoints[case]
    read = Skeleton.read(open_checkpoint(directory))
    built = skeleton_of(directory)
    assert (dict(read.shapes), read.names, read.tied) == (dict(built.shapes), built.names, built.tied)
    assert symmetries(read) == symmetries(built)

    model = getattr(transformers, CASES[case][0]).from_pretrained(directory)
    inside = Skeleton.around(model)
    assert set(inside.names.parameters) == set(inside.parameters)
    # Names differ between disk and memory; what is found is the same under the names of the model.
    parameters = read.names.parameters
    assert {site.module for site in linear_sites(inside)} >= {site.module for site in linear_sites(read)}
    on_disk = {pair.name: {parameters[side.tensor] for side in pair.sides} for pair in symmetries(read).pairs}
    in_memory = {pair.name: {side.tensor for side in pair.sides} for pair in symmetric_pairs(model)}
    assert on_disk.items() <= in_memory.items()


def test_a_trial_leaves_the_way_that_experts_are_run(checkpoints: dict[str, Path]) -> None:
    """A dry run loads by the same config, and another way rounds otherwise."""
    skeleton = Skeleton.read(open_checkpoint(checkpoints["gpt-oss"]))
    config: Any = skeleton.model.config
    before = config._experts_implementation
    assert skeleton.trial.error is None
    assert config._experts_implementation == before != "batched_mm"
