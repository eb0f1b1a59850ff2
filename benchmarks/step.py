"""What training costs beside the network's own work; each command prints one table.

python -m benchmarks.step        `fit` against a loop by hand, Lightning and Accelerate: ResNet-18 at 64 x 64 on a CPU
python -m benchmarks.step ray    what Ray adds to a training in plain processes: its start, and each report

A step's time is in CPU seconds of its process, with one thread for the network; the sides take turns step by step, so
that whatever else the machine does meets all alike. Two processes that do the same differ by some percent for as long
as they live, so each set has new ones, and the loop by hand runs twice: that ratio is what chance does. All take the
same batches from the same loader, the same model and the same optimiser; only `fit` also counts, validates and saves,
and of these counting lies within its steps.
"""

import json
import logging
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from data_loaders.ingest import Ingest, in_processes, ingest
from data_loaders.loader import training_batches
from data_loaders.settings import override
from data_loaders.sources.demo import Demo
from trainer.config import Config
from trainer.context import Local
from trainer.loop import fit

SETS, ROUNDS, WARM = 6, 12, 3
ENDLESS = 10**6
"""Steps that no side reaches."""
CPU = torch.device("cpu")
DENSE, SPARSE, PAUSE_S = 12, 4, 3
"""Reports one after the other, then reports after a pause, in seconds: Ray takes one every two seconds at most."""
FIRST = "set-up, first step and its validation"
STEP = "each further step, its validation and checkpoint"
END = "the end of the training"

PIPES = get_context("spawn")

Ended = Callable[[], None]
"""What a side calls after each of its steps."""
Way = Callable[[Config, Ended], None]


def main() -> None:
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        source = Demo(folder=folder / "images", images=600, imbalance=(6, 3, 2))
        ingest(Ingest(source=source, out=folder / "data"), in_processes(1))
        (ray_table if sys.argv[1:] == ["ray"] else step_table)(folder)


def config_for(folder: Path, **changes: Any) -> Config:
    tree = {
        "folder": str(folder / "runs"),
        "data": {"path": str(folder / "data"), "size": 64, "batch": 32, "augmentation": {"kind": "pad_crop"}},
        "model": {"kind": "resnet", "depth": 18},
        "optimizer": {"kind": "sgd", "lr": 0.01},
        "train": {"steps": ENDLESS, "report_every": ENDLESS},
        "cluster": {"on": "local", "device": "cpu"},
        "tracking": {"mode": "disabled"},
    }
    return override(Config.model_validate(tree), changes)


# --- steps ------------------------------------------------------------------------------------------------------------


def step_table(folder: Path) -> None:
    ways = {"by hand": by_hand, "by hand, again": by_hand, "fit": by_fit}
    ways |= {"Lightning": by_lightning, "Accelerate": by_accelerate}
    seconds = np.array([in_turns([*ways.values()], config_for(folder, name=f"set-{n}"), n) for n in range(SETS)])
    print(f"{SETS} sets of processes, {ROUNDS} steps each; ratios: median, least and greatest of the sets")
    print("| | CPU ms a step | against by hand | `fit` against it |\n|---|---|---|---|")
    for name, one in zip(ways, seconds.T, strict=True):
        row = [name, f"{1e3 * np.median(one):.1f}", ratio(one / seconds[:, 0]), ratio(seconds[:, 2] / one)]
        print(f"| {' | '.join(row)} |")


def in_turns(ways: list[Way], config: Config, seed: int) -> np.ndarray:
    """CPU seconds of a step for each way, the median of its rounds, in processes that are new."""
    sides = [Side(way, config) for way in ways]
    random, seconds = np.random.default_rng(seed), np.zeros((WARM + ROUNDS, len(sides)))
    for turn in range(len(seconds)):
        for place in random.permutation(len(sides)):
            seconds[turn, place] = sides[place].step()
    for side in sides:
        side.process.kill()
        side.process.join()
    return np.median(seconds[WARM:], 0)


def ratio(samples: np.ndarray) -> str:
    return f"{np.median(samples):.3f} [{samples.min():.3f}, {samples.max():.3f}]"


class Side:
    """One way to train, in a process of its own that works only in its turns, of one step each."""

    def __init__(self, way: Way, config: Config) -> None:
        self.turns, theirs = PIPES.Pipe()
        self.process = PIPES.Process(target=_work, args=(way, config, theirs), daemon=True)
        self.process.start()
        theirs.close()  # so that the death of the process is heard

    def step(self) -> float:
        """Lets it make a step; CPU seconds of its process, the loader's threads among them."""
        self.turns.send(None)
        return self.turns.recv()


def _work(way: Way, config: Config, turns: Connection) -> None:
    torch.set_num_threads(1)
    turns.recv()
    began = time.process_time()

    def ended() -> None:
        nonlocal began
        turns.send(time.process_time() - began)
        turns.recv()
        began = time.process_time()

    way(config, ended)


def batches(config: Config) -> Iterator[tuple[Tensor, Tensor]]:
    """Images and labels of each step, from the loader that `fit` has."""
    index = config.data.index()
    sampler = config.data.sampler.over(index, config.data.training_rows(index), config.seed)
    for batch in training_batches(index, config.data, sampler, config.seed, range(ENDLESS)):
        yield torch.from_numpy(batch.images), torch.from_numpy(batch.labels)


def by_hand(config: Config, ended: Ended) -> None:
    model = config.model.build(3, config.seed)
    optimizer = config.optimizer.build(model)
    for images, labels in batches(config):
        loss = cross_entropy(model(images), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        ended()


def by_fit(config: Config, ended: Ended) -> None:
    config.run_folder.mkdir(parents=True)
    fit(config, Stepwise(config.run_folder, CPU, ended=ended))


@dataclass
class Stepwise(Local):
    """Tells of the steps, after each of which `fit` asks whether to go on."""

    ended: Ended = lambda: None

    def ask_to_stop(self):
        self.ended()
        return super().ask_to_stop()


def by_lightning(config: Config, ended: Ended) -> None:
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = config.model.build(3, config.seed)

        def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
            images, labels = batch
            return cross_entropy(self.model(images), labels)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return config.optimizer.build(self.model)

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            ended()

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    trainer = lightning.Trainer(accelerator="cpu", max_steps=ENDLESS, barebones=True)  # its fastest way
    trainer.fit(Module(), train_dataloaders=batches(config))


def by_accelerate(config: Config, ended: Ended) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = config.model.build(3, config.seed)
    model, optimizer = accelerator.prepare(model, config.optimizer.build(model))
    for images, labels in batches(config):
        loss = cross_entropy(model(images), labels)
        optimizer.zero_grad(set_to_none=True)
        accelerator.backward(loss)
        optimizer.step()
        ended()


# --- Ray --------------------------------------------------------------------------------------------------------------


def ray_table(folder: Path) -> None:
    cases = [(on, workers) for on in ("local", "ray") for workers in (1, 2)]
    columns = [seconds_of(on, workers, folder) for on, workers in cases]
    print("wall seconds of a short training of the demonstration's network that reports after each step")
    print(f"| | {' | '.join(f'{on}, {workers}' for on, workers in cases)} |\n|---|{'---|' * len(cases)}")
    for what in columns[-1]:
        print(f"| {what} | {' | '.join(f'{column[what]:.2f}' if what in column else '' for column in columns)} |")


def seconds_of(on: str, workers: int, folder: Path) -> dict[str, float]:
    """What takes how long, in the order in which it comes."""
    config = config_for(
        folder,
        model={"kind": "small_cnn", "widths": [16, 32, 64, 96]},
        **{"name": f"{on}-{workers}", "cluster.on": on, "cluster.workers": workers, "data.batch": 64},
        **{"train.steps": DENSE + SPARSE, "train.report_every": 1},
    )
    return on_ray(config, folder / f"stamps-{workers}") if on == "ray" else here(config)


def here(config: Config) -> dict[str, float]:
    """In plain processes. With one worker that is this process, which has imported everything."""
    from trainer.run import train

    began = time.time()
    train(config)
    ended = time.time()
    lines = (config.run_folder / "log.jsonl").read_text().splitlines()
    reports = np.array([json.loads(line)["time"] for line in lines])
    return {FIRST: reports[0] - began, STEP: np.diff(reports).mean(), END: ended - reports[-1]}


def on_ray(config: Config, path: Path) -> dict[str, float]:
    from trainer.launch import cluster, train

    began = time.time()
    with cluster(config.cluster):
        there = time.time()
        train(config, [stamps(path)])
        trained = time.time()
    ended = time.time()
    lines = [line.split() for line in path.read_text().splitlines()]
    at = {name: np.array([float(moment) for it, moment in lines if it == name]) for name, _ in lines}
    waited = at["reported"] - at["report"]
    return {
        "Ray itself": there - began,
        "the controller": at["controller"][0] - there,
        "the workers' processes": at["worker"].max() - at["controller"][0],
        "… of which imports, as in a process that is alone": imports(),
        FIRST: at["report"][0] - at["worker"].max(),
        STEP: (at["report"][1:DENSE] - at["reported"][: DENSE - 1]).mean(),
        "waiting in a report, one after the other": waited[2:DENSE].mean(),
        f"waiting in a report, {PAUSE_S} s apart": waited[DENSE:].mean(),
        END: trained - at["reported"][-1],
        "the end of Ray": ended - trained,
    }


def imports() -> float:
    """Wall seconds; Ray's controller and each of its workers, all at once, import the same."""
    began = time.time()
    subprocess.run([sys.executable, "-c", "import trainer.launch"], check=True)
    return time.time() - began


def stamps(path: Path) -> Any:
    """Hears of a training from Ray's controller and in its workers, and writes down when what was."""
    from ray import train
    from ray.train.v2._internal.execution.callback import ControllerCallback, TrainContextCallback, WorkerCallback

    def stamp(name: str) -> None:
        with path.open("a") as file:
            file.write(f"{name} {time.time()}\n")

    class Stamps(ControllerCallback, WorkerCallback, TrainContextCallback):
        reports = 0

        def after_controller_start(self, train_run_context: Any) -> None:
            stamp("controller")

        def after_init_train_context(self) -> None:
            stamp("worker")

        @contextmanager
        def on_report(self) -> Iterator[None]:
            self.reports += 1
            time.sleep(PAUSE_S * (self.reports > DENSE))
            first = train.get_context().get_world_rank() == 0
            if first:
                stamp("report")
            yield
            if first:
                stamp("reported")

    return Stamps()


if __name__ == "__main__":
    main()
