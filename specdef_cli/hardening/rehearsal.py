"""The result without its numbers, loaded and run before the work, so that what cannot be loaded is said at once."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from specdef_cli.checkpoint.companions import carry_over
from specdef_cli.checkpoint.reader import Checkpoint
from specdef_cli.checkpoint.resolve import Resolved
from specdef_cli.checkpoint.shards import plan_shards, shard_header
from specdef_cli.errors import SpecDefError, first_line
from specdef_cli.hardening.execute import write_json
from specdef_cli.hardening.plan import HardeningPlan
from specdef_cli.model.described import SHIM_SOURCE
from specdef_cli.model.meta_model import try_out
from specdef_cli.model.opened import OpenedModel, open_found


def rehearse(base: OpenedModel, plan: HardeningPlan) -> None:
    """Load what a plan would write on the meta device, and run it there if the base runs there."""
    if not base.checkpoint.library.loads_without_weights:
        return
    model = load_empty(base, plan)
    found = None if base.skeleton.trial.error else try_out(model).error
    if found is not None:
        raise SpecDefError(
            f"the hardened model could not be run: {first_line(found)}",
            "Leave layers out (--exclude), or fold instead (--method fold).",
        ) from found


def load_empty(base: OpenedModel, plan: HardeningPlan) -> Any:
    """The model that a plan would write, on the meta device."""
    with TemporaryDirectory() as place:
        _write_empty(base.checkpoint, plan, Path(place))
        written = Resolved(Path(place), place)
        try:
            return open_found(written, trust_remote_code=base.trust_remote_code).load_without_weights()
        except SpecDefError as error:
            raise SpecDefError(error.problem.replace(place, "the hardened model"), error.hint) from error
        except OSError as error:
            raise SpecDefError(
                f"the temporary directory {place} cannot be used: {error.strerror or error}",
                "Free some space there, or set TMPDIR.",
            ) from error


def _write_empty(checkpoint: Checkpoint, plan: HardeningPlan, directory: Path) -> None:
    """Write the directory of a plan with holes for weights: no byte of them is on disk."""
    write_json(directory / "config.json", plan.config)
    (directory / SHIM_SOURCE.name).write_bytes(SHIM_SOURCE.read_bytes())
    code = [path for path in checkpoint.companions.carried if path.suffix == ".py"]
    carry_over(checkpoint.directory, directory, code)
    (shard,) = plan_shards(plan.groups, plan.nbytes + 1, checkpoint.library)
    header, _ = shard_header(shard)
    with (directory / shard.name).open("wb") as file:
        file.write(header)
        file.truncate(len(header) + shard.nbytes)
