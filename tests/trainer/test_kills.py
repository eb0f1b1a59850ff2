"""Trainings that are killed again and again, at any moment: no image is lost or learnt twice, nothing is half written,
and the weights are the same bits as without a kill."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
import pytest
from forked import Life, Trainings
from small_runs import config_for

from data_loaders import durable
from data_loaders.settings import dump, override
from trainer import checkpoint
from trainer.config import Config

ROOT = Path(__file__).parents[2]
SHORT: dict[str, Any] = {"train.steps": 16, "calibration": {"kind": "temperature"}}
KINDS: dict[str, dict[str, Any]] = {
    "one or two workers": {"train.reproducible": 2, "train.average": 0.9},
    "two workers, and patience": {"cluster.workers": 2, "train.patience": 3, "mixing": {"kind": "mixup"}},
    "one worker, and worst groups": {"loss": {"kind": "group_dro"}, "mixing": {"kind": "cmo"}},
}
KILLED = {-signal.SIGKILL, 75}
"""How a training ends that was killed: with its driver, or because of a worker."""
BEGIN_S = 120.0
"""What a driver has to start its workers; and what these have to end by themselves when it is killed, since they do not
notice before they have imported torch."""
How = dict[str, Any]
"""To kill a training, as `Trainings` takes it; empty to let it be."""


class Whole(NamedTuple):
    """A training that nobody disturbed."""

    config: Config
    life: Life
    left: list[Any]


def what_is_left(config: Config) -> list[Any]:
    """By a training that is done, without what depends on the time."""
    folder = config.run_folder
    assert durable.damage(folder / "model") is None
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    log = [(line["key"], {**line["row"], "speed": None}) for line in lines]
    return [(folder / "model" / "model.safetensors").read_bytes(), (folder / "metrics.parquet").read_bytes(), log]


def aside(config: Config) -> list[str]:
    """Files and folders that were to become others."""
    return [path.name for path in config.run_folder.rglob(".*") if path.suffix in {".tmp", ".old"}]


def step_of(config: Config) -> int:
    """Of the checkpoint that a run will go on from."""
    newest, _ = checkpoint.newest(config.run_folder)
    return checkpoint.state_of(newest).step if newest else 0


def drawn(config: Config, steps: int) -> list[list[int]]:
    """The rows of each step, as the sampler has them."""
    index, batch = config.data.index(), config.data.batch
    stream = config.data.sampler.over(index, config.data.training_rows(index), config.seed, steps * batch)
    return stream.rows(np.arange(steps * batch)).reshape(steps, batch).tolist()


@pytest.fixture(scope="module")
def trainings() -> Iterator[Trainings]:
    with Trainings() as started:
        yield started


def undisturbed(trainings: Trainings, config: Config) -> Whole:
    life = trainings(dump(config))
    assert life.code == 0, life.said
    assert list(life.learnt.values()) == drawn(config, len(life.learnt))
    return Whole(config, life, what_is_left(config))


@dataclass
class Hunt:
    """Kills trainings, and looks what is left of them."""

    trainings: Trainings
    random: Random
    kills: int = 0
    lives: int = 0
    hit: Counter[str] = field(default_factory=Counter)
    """What workers were doing when they were killed."""
    longest_orphan_s: float = 0.0

    def through(self, whole: Whole, folder: Path, next_kill: Callable[[float], How]) -> None:
        """A training to its end. `next_kill` is told how many times longer than at first a life may be, since the last
        ones came to no new checkpoint."""
        config, learnt, patience = override(whole.config, {"folder": str(folder)}), [], 1.0
        while True:
            first = step_of(config)
            workers = self.random.choice((1, 2)) if config.train.reproducible else config.cluster.most
            life = self.trainings(dump(override(config, {"cluster.workers": workers})), **next_kill(patience))
            self.lives += 1
            if life.learnt:
                assert list(life.learnt) == list(range(first, first + len(life.learnt)))  # in order, and all of them
                assert first <= len(learnt)  # none is lost
                learnt[first:] = life.learnt.values()  # what was done after the checkpoint went with the weights
            if life.code == 0:
                break
            self._look_at(life, config)
            patience = 1.0 if step_of(config) > first else patience * 1.5
        assert learnt == list(whole.life.learnt.values())
        assert what_is_left(config) == whole.left
        assert aside(config) == []

    def _look_at(self, life: Life, config: Config) -> None:
        """At one that was killed, and its folder."""
        assert life.code in KILLED, life.said
        self.kills += 1
        self.hit.update(doing for worker in life.doing for doing in worker)
        self.longest_orphan_s = max(self.longest_orphan_s, life.orphans_s)
        published = config.run_folder.glob("checkpoints/step-*")
        assert {folder.name: wrong for folder in published if (wrong := durable.damage(folder))} == {}

    def at_random(self, whole: Whole, most: int) -> Callable[[float], How]:
        """Until there were so many kills: at a moment, or before something happens to the disk."""

        def kill(patience: float) -> How:
            if self.kills == most:
                return {}
            if self.random.random() < 0.2:
                return {"at_change": self.random.randint(1, whole.life.changes)}
            after_s = self.random.uniform(0, whole.life.seconds / 4 * patience)
            return {"after_s": after_s, "whom": self.random.choice(("all", "driver", "worker"))}

        return kill


@pytest.mark.parametrize(("kills", "kinds"), [(20, 2), pytest.param(1000, len(KINDS), marks=pytest.mark.slow)])
def test_a_training_that_is_killed_at_any_moment_ends_as_one_that_is_not(
    dataset: Path, tmp_path: Path, trainings: Trainings, kills: int, kinds: int
):
    wholes = [
        undisturbed(trainings, config_for(dataset, tmp_path / kind, **SHORT, **KINDS[kind]))
        for kind in list(KINDS)[:kinds]
    ]
    hunt, runs = Hunt(trainings, Random(0)), 0
    while hunt.kills < kills:
        whole = wholes[runs % kinds]
        hunt.through(whole, tmp_path / str(runs), hunt.at_random(whole, kills))
        runs += 1
    print(f"{hunt.kills} kills, {hunt.lives} lives of {runs} trainings, {hunt.hit}, {hunt.longest_orphan_s:.3f} s")


@pytest.mark.slow
def test_a_training_that_is_killed_before_anything_that_it_does_to_the_disk_ends_as_one_that_is_not(
    dataset: Path, tmp_path: Path, trainings: Trainings
):
    whole = undisturbed(trainings, config_for(dataset, tmp_path / "whole", **SHORT | {"train.steps": 12}))
    hunt = Hunt(trainings, Random(0))
    for change in range(1, whole.life.changes + 1):
        once = iter([{"at_change": change}])
        hunt.through(whole, tmp_path / str(change), lambda _, plan=once: next(plan, {}))
    assert hunt.kills == whole.life.changes


# ------------------------------------------------------------------ with real processes

LAST_OF_TWO = """
import multiprocessing, os, signal
from trainer.context import _first_that_fails

fork = multiprocessing.get_context("fork")

def work(rank):
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)

for _ in range(100):
    processes = [fork.Process(target=work, args=(rank,)) for rank in range(2)]
    processes[0].start()
    processes[0].join()
    processes[1].start()
    print(_first_that_fails(processes))
"""


def test_a_worker_that_is_killed_when_the_others_are_through_is_never_taken_for_done():
    ended = subprocess.run([sys.executable, "-c", LAST_OF_TWO], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ended.stdout.split() == ["1"] * 100


def started(config: Config, said: Path) -> subprocess.Popen[bytes]:
    config.folder.mkdir(exist_ok=True)
    path = config.folder / "c.yaml"
    path.write_text(dump(config))
    with said.open("ab") as log:
        return subprocess.Popen([sys.executable, "-m", "jobs.train", str(path)], cwd=ROOT, stdout=log, stderr=log)


def workers_of(driver: int) -> list[int]:
    """Processes that a driver started, without Python's own."""
    children = Path(f"/proc/{driver}/task/{driver}/children").read_text().split()
    return [int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def lives(pid: int) -> bool:
    """Whether there is such a process that has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(what: Callable[[], bool], most_s: float) -> None:
    until = time.monotonic() + most_s
    while not what():
        assert time.monotonic() < until
        time.sleep(0.01)


def killed(config: Config, said: Path, whom: str, random: Random) -> None:
    """A training that ends at a random moment after its workers have begun."""
    began, process = time.monotonic(), started(config, said)
    wait_until(lambda: len(workers_of(process.pid)) == 2, BEGIN_S)
    workers = workers_of(process.pid)
    time.sleep(random.uniform(0, 2 * (time.monotonic() - began)))  # they need as long as their driver to import torch
    os.kill(process.pid if whom == "driver" else random.choice(workers), signal.SIGKILL)
    assert process.wait() in KILLED, said.read_text()
    wait_until(lambda: not any(map(lives, workers)), BEGIN_S)


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["driver", "worker"])
def test_the_same_command_goes_on_after_a_kill_and_no_worker_outlives_its_driver(
    dataset: Path, tmp_path: Path, trainings: Trainings, whom: str
):
    changes = SHORT | {"train.steps": 200, "train.report_every": 20, "cluster.workers": 2}
    whole = undisturbed(trainings, config_for(dataset, tmp_path / "whole", **changes))
    config, said = override(whole.config, {"folder": str(tmp_path / "killed")}), tmp_path / "said"
    random = Random(whom)
    for _ in range(3):
        killed(config, said, whom, random)
    assert started(config, said).wait() == 0, said.read_text()
    assert what_is_left(config) == whole.left
    assert aside(config) == []
