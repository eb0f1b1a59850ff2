"""How often conformal sets hold the true class on rows they were not fitted on, and how large they are."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from trainer.decision import conformal
from trainer.decision.conformal import By, Conformal, Score
from trainer.decision.ledger import Ledger
from trainer.decision.strata import Number, by_group, means, moments
from trainer.decision.validation import Validation
from trainer.metrics.catalogue import Floats
from trainer.metrics.groups import Grouping
from trainer.metrics.tally import Ints

ALPHA = 0.1
"""Share of true classes that a set may miss."""


class Coverage(NamedTuple):
    """How often conformal sets hold the true class, where classes occur as in use."""

    name: str
    """A class, a group, or both joined by x; empty for all."""
    coverage: Number
    size: Number
    """Classes in a set, on average."""


class Sets(NamedTuple):
    """Of one kind of conformal sets, fitted on the validation rows."""

    score: Score
    by: By
    alpha: float
    all: Coverage
    classes: list[Coverage]
    groups: list[Coverage]
    cells: list[Coverage]
    """Each class within each group that has rows of it."""
    warnings: list[str]


def coverages(
    ledger: Ledger, log_p: Floats, labels: Ints, cells: Ints, groupings: Sequence[Grouping], validation: Validation
) -> Iterator[Sets]:
    """Both scores, by all that sets can be fitted by, judged on log p [N, K], labels and cells [N] of a split."""
    finest = groupings[-1]
    known = Validation(validation.logits, validation.labels, finest.cells[validation.cells], validation.rows)
    of_validation = ledger.log_probabilities(validation.logits, cells=validation.cells)
    for score in get_args(Score):
        for by in get_args(By) if len(groupings) > 1 else ("none", "class"):
            asked = Conformal(alpha=ALPHA, by=by, score=score)
            fitted = conformal.fit(of_validation, known, len(finest.groups), ledger.deployment_prior, asked)
            found = conformal.sets(log_p, fitted, finest.cells[cells])
            yield _coverage(found, fitted, ledger, labels, cells, groupings)


def _coverage(
    found: NDArray[np.bool_],
    fitted: conformal.Thresholds,
    ledger: Ledger,
    labels: Ints,
    cells: Ints,
    groupings: Sequence[Grouping],
) -> Sets:
    hits, sizes = found[np.arange(len(labels)), labels], found.sum(1, dtype=np.int64)
    prior, k, asked = ledger.deployment_prior, len(ledger.classes), fitted.settings
    groups: list[Coverage] = []
    classes: list[Coverage] = []
    within: list[Coverage] = []
    for grouping in groupings:
        shape = len(grouping.groups), k
        parts = [
            moments(v, labels, grouping.cells[cells], shape)
            for v in (hits.astype(np.float64), sizes.astype(np.float64))
        ]
        bounds = [(np.zeros(1), np.full(1, most)) for most in (1.0, float(k))]
        total = [by_group(m, *b, prior) for m, b in zip(parts, bounds, strict=True)]
        each = [means(m, *b) for m, b in zip(parts, bounds, strict=True)]
        groups += [Coverage(name, total[0].at(g), total[1].at(g)) for g, name in enumerate(grouping.groups)]
        within += [
            Coverage(f"{grouping.groups[g]} x {ledger.classes[c]}", each[0].at(g, c), each[1].at(g, c))
            for g, c in np.argwhere(parts[0].n > 0).tolist()
            if grouping.name != "all"
        ]
        if grouping.name == "all":
            classes += [Coverage(name, each[0].at(0, c), each[1].at(0, c)) for c, name in enumerate(ledger.classes)]
    warnings = fitted.warnings(ledger.classes, groupings[-1].groups)
    return Sets(asked.score, asked.by, asked.alpha, groups[0], classes, groups[1:], within, warnings)
