"""An attack in a process of its own, in two, and in two that share one model: the same curves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from specdef_cli import attack
from tests.attack.conftest import small
from tests.commands import TWO_PROCESSES

SCRIPT = """
import sys
from pathlib import Path
from specdef_cli import attack
from specdef_cli.report.files import write_report
from specdef_cli.model.loading import process_state
from tests.attack.conftest import small

out = Path(sys.argv[2])
if int(sys.argv[3]) != process_state().num_processes:
    raise SystemExit(f"{process_state().num_processes} processes")
report = attack(small(Path(sys.argv[1]), out, steps=3, trainings=("full", "lora")))
write_report(report, out)
"""

# Accelerate shards on accelerators only. What is patched is that decision; FSDP 2 itself runs, over gloo.
SHARDED_ON_THE_CPU = """
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from specdef_cli.attack import trainer as attack_trainer

create = AcceleratorState.__init__

def create_sharded(self, *arguments, fsdp_plugin=None, **keywords):
    create(self, *arguments, fsdp_plugin=fsdp_plugin, **keywords)
    if fsdp_plugin is not None and self.distributed_type is DistributedType.MULTI_CPU:
        PartialState._shared_state["distributed_type"] = self.distributed_type = DistributedType.FSDP
        self.fsdp_plugin = fsdp_plugin

AcceleratorState.__init__ = create_sharded

class Checked(attack_trainer.AttackTrainer):
    def training_step(self, model, *arguments, **keywords):
        from torch.distributed.fsdp import FSDPModule
        assert isinstance(model, FSDPModule)
        return super().training_step(model, *arguments, **keywords)

attack_trainer.AttackTrainer = Checked
"""

# As `accelerate launch --use_fsdp --fsdp_version 2 --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP` sets them.
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
}


IMPORTED_BY_PEFT = ("kernels", "torchao", "torch/utils/_pytree.py")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "variables", "preamble"),
    [
        pytest.param(1, {}, "", id="one"),
        pytest.param(2, {}, "", id="two"),
        pytest.param(2, FSDP, SHARDED_ON_THE_CPU, id="two-sharded"),
    ],
)
def test_in_processes_of_their_own(
    hardened: Path, tmp_path: Path, processes: int, variables: dict[str, str], preamble: str
) -> None:
    script = tmp_path / "script.py"
    script.write_text(preamble + SCRIPT)
    done = subprocess.run(
        [*(TWO_PROCESSES if processes > 1 else [sys.executable]), str(script),
         str(hardened), str(tmp_path / "out"), str(processes)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        | variables,
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == ""
    if processes == 1:
        # What bitsandbytes and torchao say when PEFT imports them is theirs.
        said = [line for line in done.stderr.splitlines() if not any(word in line for word in IMPORTED_BY_PEFT)]
        assert said == []
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"runs", "report.html", "report.json", "curves.csv", "curves.png"}
    found = json.loads((tmp_path / "out" / "report.json").read_text())["runs"]
    here = attack(small(hardened, tmp_path / "here", steps=3, trainings=("full", "lora"))).runs
    assert len(found) == len(here) > 4  # the control and the model, full and LoRA, and the model collapsed
    for one, other in zip(found, here, strict=True):
        curve = [point["loss"] for point in one["curve"]["evaluations"]]
        assert curve == pytest.approx([point.loss for point in other.evaluations], rel=1e-4)
