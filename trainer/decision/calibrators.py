"""What a calibrator is once it is fitted: a small frozen value that travels with the model.

Each maps logits [N, K] to calibrated logits [N, K], both conditioned on the prior of the ledger's logits; so any later
prior is Bayes' rule, whatever the calibrator. None gives a probability of 0.
"""

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import numpy as np

from trainer.metrics.catalogue import Floats
from trainer.metrics.tally import Ints

NEARLY_ONE = 1 - 2.0**-53
"""The largest probability below 1: the log of its rest is a number."""


@dataclass(frozen=True)
class Fitted:
    """What all calibrators can do."""

    kind: ClassVar[str]

    def __call__(self, logits: Floats, cells: Ints | None = None) -> Floats:
        """Calibrated logits [N, K], float64; cells [N] are of the groups, -1 where unknown."""
        raise NotImplementedError

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind} | {f.name: np.asarray(getattr(self, f.name)).tolist() for f in fields(self)}


@dataclass(frozen=True)
class Temperatures(Fitted):
    """Divides logits by one number (Guo et al. 2017), or by one for each cell of groups."""

    kind: ClassVar[str] = "temperature"
    overall: float
    by_cell: Floats = field(default_factory=lambda: np.zeros(0))
    """[C], of the cells 0 to C - 1; `overall` holds for all others, and where no cells are given."""

    def __call__(self, logits: Floats, cells: Ints | None = None) -> Floats:
        logits = np.asarray(logits, np.float64)
        if cells is None:
            return logits / self.overall
        known = (cells >= 0) & (cells < len(self.by_cell))
        return logits / np.append(self.by_cell, self.overall)[np.where(known, cells, -1)][:, None]

    def __str__(self) -> str:
        return f"temperature {self.overall:.3f}" + (", and one by group" if len(self.by_cell) else "")


@dataclass(frozen=True)
class Affine(Fitted):
    """A linear function of log-probabilities, so that a constant added to all logits of a row changes nothing."""

    kind: ClassVar[str] = "affine"
    slopes: Floats
    """[], [K] or [K, K]: the same for all classes, one for each, or of each class (row) by each (column)."""
    biases: Floats
    """[K], nats."""

    def __call__(self, logits: Floats, cells: Ints | None = None) -> Floats:
        return sloped(log_softmax(logits), self.slopes) + self.biases

    def __str__(self) -> str:
        return ("a slope and biases", "slopes and biases", "a matrix and biases")[np.ndim(self.slopes)]


@dataclass(frozen=True)
class Betas(Fitted):
    """log p / (1 - p) = a log q - b log(1 - q) + c of each class against the rest (Kull et al. 2017), normalised."""

    kind: ClassVar[str] = "beta"
    a: Floats
    """[K]"""
    b: Floats
    """[K]"""
    c: Floats
    """[K], nats."""
    shift: Floats
    """[K], from the logits to the prior that it was fitted under, nats."""

    def __call__(self, logits: Floats, cells: Ints | None = None) -> Floats:
        log_q, log_rest = against_rest(logits, self.shift)
        return -np.logaddexp(0, self.b * log_rest - self.a * log_q - self.c) - self.shift

    def __str__(self) -> str:
        return "a beta curve for each class"


@dataclass(frozen=True)
class Curves(Fitted):
    """A rising curve for each class against the rest (Zadrozny & Elkan 2002), linear between its knots, normalised."""

    kind: ClassVar[str] = "isotonic"
    classes: Floats
    """[M], which class a knot is of; a class that has none stays as it is."""
    inputs: Floats
    """[M], probabilities that rise within a class."""
    outputs: Floats
    """[M], probabilities; none is 0 or 1."""
    shift: Floats
    """[K], from the logits to the prior that it was fitted under, nats."""

    def __call__(self, logits: Floats, cells: Ints | None = None) -> Floats:
        log_p = against_rest(logits, self.shift)[0]
        for k in np.unique(self.classes).astype(int):
            own = self.classes == k
            log_p[:, k] = np.log(np.interp(np.exp(log_p[:, k]), self.inputs[own], self.outputs[own]))
        return log_p - self.shift

    def __str__(self) -> str:
        return "a rising curve for each class"


KINDS: dict[str, type[Fitted]] = {kind.kind: kind for kind in (Temperatures, Affine, Betas, Curves)}


def from_json(tree: dict[str, Any]) -> Fitted:
    """The calibrator that `to_json` wrote, the same in every bit."""
    parts = {k: np.array(v, np.float64) if isinstance(v, list) else v for k, v in tree.items() if k != "kind"}
    return KINDS[tree["kind"]](**parts)


def sloped(log_p: Floats, slopes: Floats) -> Floats:
    """[N, K], slopes as in `Affine`."""
    return log_p @ slopes.T if np.ndim(slopes) == 2 else log_p * slopes


def against_rest(logits: Floats, shift: Floats) -> tuple[Floats, Floats]:
    """[N, K] log q and log(1 - q) of each class, where q = softmax(logits + shift)."""
    log_q = log_softmax(np.asarray(logits, np.float64) + shift)
    return log_q, np.log1p(-np.minimum(np.exp(log_q), NEARLY_ONE))


def log_softmax(logits: Floats) -> Floats:
    """Along the last axis, in float64."""
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
