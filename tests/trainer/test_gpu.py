"""What only a GPU can show; skipped where there is none."""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from small_runs import config_for

from trainer import loop
from trainer.context import Local
from trainer.learner import Learner

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GPU = torch.device("cuda", 0)
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "mixed and weighted": {
        "mixing": {"kind": "mixup"},
        "loss": {"kind": "balanced_softmax", "weights": {"kind": "effective_number"}},
        "train.average": 0.9,
        "optimizer.clip": 1.0,
    },
    "foregrounds": {"mixing": {"kind": "cmo"}, "loss": {"kind": "group_dro"}},
    "half": {"train.precision": "float16"},
}


def fitted(dataset: Path, folder: Path, **changes: Any) -> dict[str, torch.Tensor]:
    config = config_for(dataset, folder, **{"calibration": {"kind": "temperature"}, "cluster.device": "gpu"} | changes)
    config.run_folder.mkdir(parents=True)
    kept: list[Learner] = []
    step = Learner.step

    def stepping(self: Learner, batch: Any, partners: Any, number: int) -> Any:
        kept[:] = [self]
        if number < 2:  # the first steps allocate
            return step(self, batch, partners, number)
        torch.cuda.set_sync_debug_mode("error")
        try:
            return step(self, batch, partners, number)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    with mock.patch.object(Learner, "step", stepping):
        loop.fit(config, Local(config.run_folder, GPU))
    return {name: value.cpu() for name, value in kept[0].model.state_dict().items()}


@pytest.mark.parametrize("kind", KINDS)
def test_no_step_waits_for_the_gpu(dataset, tmp_path, kind):
    assert all(value.isfinite().all() for value in fitted(dataset, tmp_path, **KINDS[kind]).values())


def test_a_reproducible_run_has_the_same_bits_twice(dataset, tmp_path):
    a, b = (fitted(dataset, tmp_path / name, **{"train.reproducible": 4}) for name in "ab")
    assert all(torch.equal(b[name], value) for name, value in a.items())
