"""Checkpoints: restored at any step, whatever happens to their bytes, and written while training goes on."""

import json
import shutil
import threading
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from small_runs import CPU, config_for, train

from data_loaders import durable
from data_loaders.loader import training_batches
from trainer import checkpoint, loop
from trainer.config import Config
from trainer.context import Local
from trainer.learner import Learner

Seen = dict[int, tuple[list[int], torch.Tensor]]
"""Step -> rows of the batch, and the logits of each."""


class Saving(Local):
    """A worker that is asked for a checkpoint after every step."""

    def ask_to_stop(self):
        return "checkpoint"


def watched(config: Config, context: type[Local]) -> Seen:
    """Trains, and tells what every step saw."""
    seen: Seen = {}
    step = Learner.step
    rows: dict[int, list[int]] = {}

    def batches(index: Any, data: Any, sampler: Any, seed: int, steps: range, places: range, **how: Any) -> Any:
        for number, batch in zip(
            steps, training_batches(index, data, sampler, seed, steps, places, **how), strict=True
        ):
            rows[number] = batch.rows.tolist()
            yield batch

    def stepping(self: Learner, batch: Any, partners: Any, number: int) -> Any:
        outcome = step(self, batch, partners, number)
        seen[number] = rows[number], outcome.logits
        return outcome

    config.run_folder.mkdir(parents=True, exist_ok=True)
    with mock.patch.object(loop, "training_batches", batches), mock.patch.object(Learner, "step", stepping):
        loop.fit(config, context(config.run_folder, CPU))
    return seen


def restored_everywhere(dataset: Path, folder: Path, steps: int) -> None:
    changes: dict[str, Any] = {
        "train.steps": steps,
        "train.report_every": 50,
        "train.keep": steps,
        "train.average": 0.9,
    }
    changes |= {"calibration": {"kind": "temperature"}, "optimizer": {"kind": "adamw"}, "mixing": {"kind": "mixup"}}
    whole = config_for(dataset, folder / "whole", **changes)
    seen = watched(whole, Saving)
    for done in range(1, steps):
        parted = config_for(dataset, folder / "parted", **changes)
        key = checkpoint.key_of(done)
        shutil.copytree(whole.run_folder / "checkpoints" / key, parted.run_folder / "checkpoints" / key)
        again = watched(parted, Local)
        assert sorted(again) == list(range(done, steps))
        for step, (rows, logits) in again.items():
            assert rows == seen[step][0]
            assert torch.equal(logits, seen[step][1])
        shutil.rmtree(parted.run_folder)


def test_a_run_goes_on_from_any_step_with_the_same_batches_and_logits(dataset, tmp_path):
    restored_everywhere(dataset, tmp_path, 12)


@pytest.mark.slow
def test_a_run_of_100_steps_goes_on_from_any_of_them_with_the_same_batches_and_logits(dataset, tmp_path):
    restored_everywhere(dataset, tmp_path, 100)


def test_600_flipped_bits_and_200_truncations_of_a_checkpoint_are_all_found(dataset, tmp_path):
    config = config_for(dataset, tmp_path, calibration={"kind": "temperature"})
    train(config)
    previous, last = sorted((config.run_folder / "checkpoints").iterdir())
    files = sorted(last.iterdir())
    assert {path.name for path in files} >= {
        "MANIFEST.json",
        "state.json",
        "model.safetensors",
        "optimizer.safetensors",
    }
    random = np.random.default_rng(0)
    missed: list[tuple[str, str, int]] = []
    for n in range(800):
        path = files[n % len(files)]
        content = path.read_bytes()
        place = int(random.integers(len(content)))
        damaged = bytearray(content)
        damaged[place] ^= 1 << int(random.integers(8))
        path.write_bytes(bytes(damaged) if n < 600 else content[:place])
        found, skipped = checkpoint.newest(config.run_folder)
        if found == last and not _says_the_same(path, content):
            missed.append(("flip" if n < 600 else "cut", path.name, place))
        elif found != last:
            assert found == previous
            assert len(skipped) == 1
        path.write_bytes(content)
    assert not missed
    assert checkpoint.newest(config.run_folder) == (last, [])


def _says_the_same(path: Path, content: bytes) -> bool:
    """Whether a manifest still names the same hashes: a flipped bit in its blanks harms nobody."""
    try:
        return path.name == durable.MANIFEST and json.loads(path.read_bytes()) == json.loads(content)
    except ValueError:
        return False


def test_training_goes_on_while_a_checkpoint_is_written_and_the_next_one_waits(dataset, tmp_path):
    writer = checkpoint.Writer(tmp_path, keep=1)
    may_write = threading.Event()
    published, weights = checkpoint.publish, torch.arange(8.0)

    def slowly(*given: Any) -> Path:
        assert may_write.wait(10)
        return published(*given)

    with mock.patch.object(checkpoint, "publish", slowly):
        writer.save(checkpoint.State(1, "x"), checkpoint.Learned({"model": {"w": weights}}, {}))
        weights += 1  # what is written is what was there
        assert writer.published is None
        may_write.set()
        writer.save(checkpoint.State(2, "x"), checkpoint.Learned({"model": {"w": weights}}, {}))
        assert writer.published == tmp_path / "checkpoints" / "step-000000001"
        first = checkpoint.load(tmp_path / "checkpoints" / "step-000000001")[1].tensors["model"]["w"]
        writer.close()
    assert torch.equal(first, torch.arange(8.0))
    assert [folder.name for folder in (tmp_path / "checkpoints").iterdir()] == ["step-000000002"]


def test_checkpoints_that_are_damaged_do_not_push_out_those_that_are_written_after_them(dataset, tmp_path):
    config = config_for(dataset, tmp_path, **{"train.keep": 2, "calibration": {"kind": "temperature"}})
    train(config)
    for folder in (config.run_folder / "checkpoints").iterdir():
        (folder / "state.json").write_text("{}")
    train(config, stop_after=4)
    found, skipped = checkpoint.newest(config.run_folder)
    assert found
    assert found.name == "step-000000004"
    assert len(skipped) == 2


def test_what_cannot_be_written_is_told_at_the_next_checkpoint_or_at_the_end(tmp_path):
    (tmp_path / "checkpoints").write_text("in the way")
    writer = checkpoint.Writer(tmp_path, keep=1)
    writer.save(checkpoint.State(1, "x"), checkpoint.Learned({"model": {"w": torch.zeros(2)}}, {}))
    with pytest.raises(OSError, match="checkpoints"):
        writer.close()
