"""What a search tries: a range for each dotted path of a training's settings, and how the trials are judged."""

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, InstanceOf, NonNegativeInt, PlainSerializer, PositiveInt

from data_loaders.faults import Fault, Refusal
from data_loaders.settings import Fraction, Settings, nearest, override, value_of
from trainer.config import Config
from trainer.metrics.catalogue import FAIRNESS, RATES, better, single
from trainer.metrics.tally import Tally

Value = float | int | str
"""What a searcher proposes: a number, or the text of a choice."""
CALIBRATED_NLL = "calibrated_nll"
INSIDE = 0.6180339887498949
"""A place in an interval that is no whole number in any."""
SAME = ("name", "folder", "cluster", "tracking", "decision")
SAME_TOO = (
    "data.path",
    "data.train",
    "data.validation",
    "data.threads",
    "data.loading",
    "data.memory",
    "data.cache",
    "train.members",
    "train.keep",
)
"""Settings, and sections of them, that all trials share, or they could not be compared."""
SHAPE = re.compile(r"(\w+)\((.*)\)", re.DOTALL)


class Range(ABC):
    """Values of one setting."""

    @abstractmethod
    def examples(self) -> Iterator[Value]:
        """Values that show whether a range can be: the ends of an interval and a fraction inside, or each choice."""


@dataclass(frozen=True)
class Uniform(Range):
    """Real numbers, all equally likely."""

    low: float
    high: float

    def examples(self) -> Iterator[Value]:
        yield from (self.low, self.high, self.low + (self.high - self.low) * INSIDE)

    def __str__(self) -> str:
        return f"uniform({self.low!r}, {self.high!r})"


@dataclass(frozen=True)
class LogUniform(Range):
    """Positive real numbers whose logarithms are equally likely."""

    low: float
    high: float

    def examples(self) -> Iterator[Value]:
        yield from (self.low, self.high, self.low + (self.high - self.low) * INSIDE)

    def __str__(self) -> str:
        return f"log_uniform({self.low!r}, {self.high!r})"


@dataclass(frozen=True)
class Integer(Range):
    """Whole numbers, both ends included, all equally likely."""

    low: int
    high: int

    def examples(self) -> Iterator[Value]:
        yield from (self.low, self.high)

    def __str__(self) -> str:
        return f"integer({self.low}, {self.high})"


@dataclass(frozen=True)
class Choice(Range):
    """One of these, as YAML texts."""

    texts: tuple[str, ...]

    def examples(self) -> Iterator[Value]:
        yield from self.texts

    def __str__(self) -> str:
        return f"choice({', '.join(self.texts)})"


def read_range(text: Any) -> Any:
    """The range that a text such as `log_uniform(1e-6, 1e-2)` describes."""
    if isinstance(text, Range):
        return text
    found = SHAPE.fullmatch(str(text).strip())
    if not found or found[1] not in KINDS:
        raise ValueError("a range is uniform(low, high), log_uniform(low, high), integer(low, high) or choice(a, b, …)")
    return KINDS[found[1]](found[2])


def _interval(
    kind: Callable[[Any, Any], Range], number: Callable[[str], float], least: float
) -> Callable[[str], Range]:
    def read(inside: str) -> Range:
        low, high = map(number, inside.split(","))
        if not least < low < high:
            raise ValueError("the least value stands before the greatest" + (", above 0" if least == 0 else ""))
        return kind(low, high)

    return read


def _choice(inside: str) -> Range:
    values = [v if isinstance(v, str) else json.dumps(v).replace('"', "") for v in value_of(f"[{inside}]")]
    if len(set(values)) < max(2, len(values)):
        raise ValueError("a choice is between two values or more, all different")
    return Choice(tuple(values))


KINDS: dict[str, Callable[[str], Range]] = {
    "uniform": _interval(Uniform, float, -float("inf")),
    "log_uniform": _interval(LogUniform, float, 0),
    "integer": _interval(Integer, int, -float("inf")),
    "choice": _choice,
}
AnyRange = Annotated[InstanceOf[Range], BeforeValidator(read_range), PlainSerializer(str, return_type=str)]

DEFAULT_SPACE: dict[str, Range] = {
    "penalties.l1": LogUniform(1e-8, 1e-4),
    "penalties.l2": LogUniform(1e-6, 1e-2),
    "model.dropout": Uniform(0, 0.5),
    "data.sampler.temper": Uniform(0, 1),
}
OBJECTIVES = (CALIBRATED_NLL, *(name for name in (*RATES, *FAIRNESS) if better(name) != "neither"))


def applied(config: Config, changes: dict[str, Value]) -> Config:
    """The config with these values of a search's paths."""
    return override(config, {path: value_of(v) if isinstance(v, str) else v for path, v in changes.items()})


class Search(Settings):
    """What is tried, and how the trials are judged."""

    space: dict[str, AnyRange] = Field(default_factory=dict)
    """Setting -> range: `uniform(low, high)`, `log_uniform(low, high)`, `integer(low, high)` or `choice(a, b, …)`. By
    default penalties.l1, penalties.l2, model.dropout and data.sampler.temper."""
    trials: PositiveInt = 20
    """Trainings that are tried; more of them extend a search that is done."""
    searcher: Literal["tpe", "random"] = "tpe"
    """How values are proposed: by a tree-structured Parzen estimator (Bergstra et al. 2011) or at random."""
    objective: str = CALIBRATED_NLL
    """Judges a trial on the validation split: the NLL in use after temperature scaling, or any metric of the catalogue
    (of one by class, the worst class; a fairness metric compares all groups)."""
    early_stopping: Literal["asha", "none"] = "asha"
    """Whether trials that fall behind are stopped: asynchronous successive halving (Li et al. 2020)."""
    grace: Annotated[Fraction, Field(gt=0)] = 0.2
    """Share of its steps that every trial may run."""
    reduction: Annotated[float, Field(gt=1)] = 3.0
    """One trial in so many goes on, each time as many times the steps are done."""
    concurrent: PositiveInt | None = None
    """Trials at once; by default as many as the cluster has room for."""
    seed: NonNegativeInt = 0

    @property
    def ranges(self) -> dict[str, Range]:
        """The space, or the default one."""
        return self.space or DEFAULT_SPACE

    @property
    def mode(self) -> Literal["min", "max"]:
        """Whether the objective is better when low or high."""
        return "max" if self.objective != CALIBRATED_NLL and better(self.objective) == "higher" else "min"

    def score(self, calibrated_nll: float, tally: Tally) -> float:
        """The objective of a report, of the validation split."""
        return calibrated_nll if self.objective == CALIBRATED_NLL else single(self.objective, tally)


class Tuning(Config):
    """A search: the settings of a training, some of which it varies."""

    name: str = Field("search", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Names the folder of the search, and the group of its runs in Weights & Biases."""
    search: Search = Search()
    resume: bool = False
    """Also `--resume`: refuses to start a new search. Without it, the same words start or go on."""

    def training(self) -> Config:
        """The settings that all trials share, in the folder of the search."""
        tracking = self.tracking.model_copy(update={"group": self.tracking.group or self.name})
        fields = {name: getattr(self, name) for name in Config.model_fields}
        return Config(**fields | {"folder": self.run_folder, "tracking": tracking})

    def faults(self) -> list[Fault]:
        found = []
        if self.train.members > 1:
            found.append(Fault("train.members", "a search trains single models", "train the ensemble of the winner"))
        if self.search.objective not in OBJECTIVES:
            what = f"no metric {self.search.objective!r} to search by"
            found.append(Fault("search.objective", what, nearest(self.search.objective, OBJECTIVES)))
        if self.cluster.on == "local":
            found.append(Fault("cluster.on", "a search runs on Ray", "leave it out; Ray starts on this machine"))
        for path, values in self.search.ranges.items():
            where = f"search.space.{path}" if self.search.space else "search.space"
            if path.split(".")[0] in SAME or path in SAME_TOO:
                found.append(Fault(where, "is the same for all trials, so there is nothing to search"))
                continue
            try:
                for value in values.examples():
                    applied(self.training(), {path: value})
            except Refusal as refusal:
                fix = "" if self.search.space else f"give a space without {path}, which is in the default one"
                found += [Fault(where, fault.what, fix or fault.fix) for fault in refusal.faults]
        return found
