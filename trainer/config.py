"""One training run, as one tree of settings. It only composes; each part lives with what it sets."""

from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from data_loaders.loader import Data
from data_loaders.settings import Fraction, Settings, digest
from trainer.context import Cluster
from trainer.decision.fits import AnyCalibrator, Best, Temperature
from trainer.decision.ledger import Decision
from trainer.losses import AnyLoss, CrossEntropy
from trainer.mixing import AnyMixing, Unmixed
from trainer.model import AnyModel, SmallCnn
from trainer.optimizer import AnyOptimizer, Sgd
from trainer.penalties import Penalties
from trainer.tracking import Tracking


class Train(Settings):
    """How long to train, and how."""

    epochs: PositiveFloat = 10.0
    """Times that as many images are drawn as the training split has rows."""
    steps: PositiveInt | None = None
    """Optimiser steps; wins over epochs."""
    report_every: PositiveInt = 100
    """Steps between two reports, each with a validation and a checkpoint."""
    keep: PositiveInt = 2
    """Checkpoints that are kept, the newest ones."""
    members: PositiveInt = 1
    """Models of an ensemble: each is a run of its own, with a seed of its own; their probabilities are averaged."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of convolutions and products; `auto` is bfloat16 on a GPU that has it, else float32. float16 scales the loss, so
    that small gradients are not lost."""
    accumulate: PositiveInt = 1
    """Micro-batches that each worker cuts its share of a batch into, one after the other, to need less memory."""
    reproducible: PositiveInt | None = None
    """Micro-batches of the whole batch, for a run whose weights are the same bits with any number of workers up to it,
    and if that changes: gradients are added in a fixed tree, and batch norm sees a micro-batch at a time. By default
    gradients are added by the workers as is fastest, and other workers give other roundings."""
    sync_batch_norm: bool = False
    """Whether batch norm sees the whole batch of all workers (on GPUs), not each worker's share."""
    compile: bool = False
    """Whether torch compiles the network; where it cannot, it says so and runs as it is."""
    average: Fraction | None = None
    """Share of the old in a running mean of the weights (0.999, say), which is then validated and kept. It begins with
    less, so that it forgets the first weights."""
    patience: PositiveInt | None = None
    """Reports without a better NLL on the validation rows, after temperature scaling, before training stops early and
    keeps the weights of the best report."""

    def total(self, rows: int, batch: int) -> int:
        """Optimiser steps of the run."""
        return self.steps or max(1, round(self.epochs * rows / batch))


class Config(Settings):
    """One training run."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Names the run's folder, and its run in Weights & Biases."""
    folder: Path = Path("runs")
    """Where run folders lie; on a cluster, storage that every node sees."""
    seed: int = Field(default=0, ge=0, lt=2**48)
    """Seeds the order of the data, the augmentation, the first weights and dropout."""
    data: Data
    model: AnyModel = SmallCnn()
    loss: AnyLoss = CrossEntropy()
    mixing: AnyMixing = Unmixed()
    """Whether images of a batch are blended with one another."""
    penalties: Penalties = Penalties()
    optimizer: AnyOptimizer = Sgd()
    train: Train = Train()
    decision: Decision = Decision()
    calibration: AnyCalibrator = Best()
    """What makes probabilities mean what they say, fitted on the validation rows after training."""
    cluster: Cluster = Cluster()
    tracking: Tracking = Tracking()
    resume: bool = False
    """Also `--resume`: refuses to start a new run. Without it, the same words start or go on."""

    @model_validator(mode="after")
    def _fits_together(self) -> "Config":
        if self.data.size < self.model.least_size:
            raise ValueError(
                f"data.size={self.data.size} is too small for the model, which needs {self.model.least_size}"
            )
        if self.loss.heads not in (None, self.model.heads):
            raise ValueError(f"loss.kind={self.loss.kind} needs model.heads={self.loss.heads}")
        alone = ("compile", "sync_batch_norm") if self.train.accumulate == 1 else ("accumulate",)
        others = [f"train.{name}" for name in alone if getattr(self.train, name)] if self.train.reproducible else []
        if others:
            raise ValueError(f"train.reproducible does not go with {' and '.join(others)}")
        if self.loss.adaptive and self.train.accumulate > 1:
            raise ValueError(f"loss.kind={self.loss.kind} looks at a whole batch at once: train.accumulate is 1")
        return self

    def members(self) -> list["Config"]:
        """The runs of an ensemble, in `members/` of its folder; ensembles of one size share no member's seed.

        Members get plain temperatures, which the ensemble can hold; `calibration` is of the whole.
        """
        n = self.train.members
        alone = self.train.model_copy(update={"members": 1})
        group = self.tracking.model_copy(update={"group": self.tracking.group or self.name})
        same = {"folder": self.run_folder / "members", "train": alone, "tracking": group, "calibration": Temperature()}
        return [
            self.model_copy(update={**same, "name": f"{self.name}-{k}", "seed": self.seed * n + k}) for k in range(n)
        ]

    @property
    def run_folder(self) -> Path:
        return self.folder / self.name

    @property
    def identity(self) -> str:
        """Hash of what decides the model: the same for any cluster, place, tracking and number of threads."""
        same = {"name": "run", "folder": Path("runs"), "cluster": Cluster(), "tracking": Tracking(), "resume": False}
        data = self.data.model_copy(update={"threads": 1, "loading": "threads", "memory": 1, "cache": None})
        return digest(self.model_copy(update=same | {"data": data, "train": self.train.model_copy(update={"keep": 1})}))
