"""What decisions cost on a split, how much of it another threshold would mend, and for whom: by class and by group."""

from collections.abc import Iterator, Sequence
from statistics import NormalDist
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from data_loaders.audit.finding import Finding
from data_loaders.audit.summary import plain
from trainer.decision.calibrators import log_softmax
from trainer.decision.coverage import Sets, coverages
from trainer.decision.curves import Benefit, CostPoint, cost_curve, net_benefit
from trainer.decision.discrimination import auroc
from trainer.decision.ledger import Ledger
from trainer.decision.regret import costs_of, oracle
from trainer.decision.strata import (
    Means,
    Number,
    by_group,
    combined,
    evenly,
    group_gaps,
    means,
    moments,
    refuse_no_numbers,
)
from trainer.decision.validation import Validation
from trainer.metrics.catalogue import Floats, divide
from trainer.metrics.decomposition import Sure, corp, sure
from trainer.metrics.groups import Grouping
from trainer.metrics.intervals import LEVEL
from trainer.metrics.tally import Ints

ViewName = Literal["argmax", "ledger"]
MOST_ENTRIES = 2**22
"""Entries of logits, rows times classes, that are looked at; of more rows a sample, of each class the same number."""
SURE_ENTRIES, DRAWS = 2**17, 200
"""Entries up to which the parts of a score have intervals, and their replicates."""
NOTABLE = 0.05
"""Of the cost at hand that a regret, or in mistakes a gap, must reach to be told."""
FALSE = 0.05
"""Of false findings of a kind, two-sided."""


class ClassCost(NamedTuple):
    """Of the rows of one class."""

    name: str
    cost: Number
    """Mean cost of the decisions."""
    regret: Number
    """That less what the oracle's cost; below 0 where the oracle gives up on the class for the sake of others."""
    remains: Number
    """Mean cost of the oracle's decisions, in mistakes: what deciding another class at random costs is 1."""
    gap: Number
    """`remains` less its mean over the other classes."""
    auroc: Number
    """Of the class against all others."""
    auroc_gap: Number
    """That less its mean over the other classes, as if of other rows."""


class GroupCost(NamedTuple):
    """Of the rows of one group."""

    grouping: str
    name: str
    cost: Number
    """Mean cost of the decisions."""
    regret: Number
    remains: Number
    """Mean cost of the oracle's decisions."""
    gap: Number
    """`remains` less that of all other groups, for the same mix of classes."""


class ViewCost(NamedTuple):
    """Of one way to decide."""

    view: ViewName
    cost: Number
    """Expected, where classes occur as in use."""
    decision_bias: Number
    """`cost` less `score_bias`: what another prior, or other costs or thresholds, would mend (paired)."""
    score_bias: Number
    """Expected cost of the oracle on the same scores."""
    abstained: Number
    """Share of the images, where classes occur as in use."""
    classes: list[ClassCost]
    groups: list[GroupCost]
    curve: list[CostPoint]


class ClassBenefit(NamedTuple):
    name: str
    points: list[Benefit]


class ClassScore(NamedTuple):
    """Of a class against the rest: score = miscalibration - discrimination + uncertainty."""

    name: str
    """Empty of their sum, the Brier score."""
    score: Number
    miscalibration: Number
    chance: float
    """What the miscalibration of a calibrated model stays below in 95 of 100 cases."""
    discrimination: Number
    uncertainty: Number


class Scores(NamedTuple):
    """Of one way to make probabilities."""

    view: ViewName
    classes: list[ClassScore]


class Analysis(NamedTuple):
    """Of one split."""

    classes: tuple[str, ...]
    rows: int
    n: int
    """Rows that were looked at: all, or of very many a sample."""
    views: list[ViewCost]
    benefits: list[ClassBenefit]
    """Net benefit of the calibrated probabilities."""
    sets: list[Sets]
    """Empty without validation rows."""
    scores: list[Scores]
    """The Brier score of each view, split into its parts."""


def analyse(
    ledger: Ledger,
    logits: Floats,
    labels: Ints,
    cells: Ints,
    groupings: Sequence[Grouping],
    validation: Validation | None = None,
    seed: int = 0,
) -> Analysis:
    """Of logits [N, K], labels and cells [N] of a split that the ledger was not calibrated on.

    `groupings` are those of `trainer.metrics.groups`. Give no validation rows where the split is the validation split:
    sets would be judged on the rows they were fitted on. Refuses logits that are no numbers.
    """
    refuse_no_numbers(logits, "the split")
    random = np.random.Generator(np.random.Philox(key=[seed, len(labels)]))
    kept = evenly(labels, max(MOST_ENTRIES // len(ledger.classes), 1), random)
    rows = len(labels)
    logits, labels, cells = logits[kept], labels[kept], cells[kept]
    by_view = {"argmax": log_softmax(logits), "ledger": ledger.log_probabilities(logits, cells=cells)}
    decisions = {"argmax": by_view["argmax"].argmax(1), "ledger": ledger.decide(by_view["ledger"])}
    prior, log_p = ledger.deployment_prior, by_view["ledger"]
    benefits = zip(ledger.classes, net_benefit(log_p, labels, prior), strict=True)
    return Analysis(
        classes=ledger.classes,
        rows=rows,
        n=len(labels),
        views=[
            _view(name, ledger, by_view[name], decisions[name], labels, cells, groupings, seed)
            for name in get_args(ViewName)
        ],
        benefits=[ClassBenefit(*line) for line in benefits],
        sets=[] if validation is None else list(coverages(ledger, log_p, labels, cells, groupings, validation)),
        scores=[Scores(name, _parts(np.exp(by_view[name]), labels, ledger)) for name in get_args(ViewName)],
    )


def _parts(p: Floats, labels: Ints, ledger: Ledger) -> list[ClassScore]:
    """Of probabilities [N, K], where classes occur as in use; intervals where there are few classes."""
    seen = np.bincount(labels, minlength=p.shape[1])
    weights = np.where(seen > 0, divide(ledger.deployment_prior, seen), 0)
    found, n = corp(p, labels, weights), len(labels)
    absent = np.full(p.shape[1] + 1, np.nan)
    few = p.size <= SURE_ENTRIES
    unsure = Sure((absent, absent), (absent, absent), absent, absent)
    sure_of = sure(p, labels, weights, replicates=DRAWS) if few else unsure

    def number(value: Floats, k: int, interval: tuple[Floats, Floats] = (absent, absent)) -> Number:
        return Number(float(value[k]), float(interval[0][k]), float(interval[1][k]), n)

    return [
        ClassScore(
            name,
            number(found.score, k),
            number(found.miscalibration, k, sure_of.miscalibration),
            float(sure_of.chance_high[k]),
            number(found.discrimination, k, sure_of.discrimination),
            number(found.uncertainty, k),
        )
        for k, name in enumerate([*ledger.classes, ""])
    ]


def to_json(a: Analysis) -> dict[str, Any]:
    """With what stands out of the ledger's decisions: a bare argmax is not what the model decides by."""
    return {**plain(a), "findings": [plain(f) for f in findings(a, ("ledger",))]}


def findings(a: Analysis, views: Sequence[ViewName] = get_args(ViewName)) -> Iterator[Finding]:
    """What stands out of the decisions and of the scores, with many classes or groups only what is surer for each
    (Bonferroni). A class has worse scores where the oracle leaves it more mistakes than the others, and its AUROC is
    lower too: the first alone may be what the costs ask for."""
    for view in a.views:
        yield from _of_decisions(view) if view.view in views else ()
    yield from _of_scores(a.views[-1])


def _of_decisions(view: ViewCost) -> Iterator[Finding]:
    """Of classes and groups only where there is something to save in all: else they pay for one another."""
    regret, left = view.decision_bias, view.score_bias
    if not (regret.low > 0 and regret.value >= NOTABLE * view.cost.value):
        return
    text = f"the {view.view} decisions cost {view.cost}; the best thresholds on the same scores save {regret}"
    yield _finding("decision", view.view, f"{text} and leave {left}", regret)
    for line, where in [*((c, c.name) for c in view.classes), *((g, g.name) for g in _groups(view))]:
        tests = len(view.classes) if isinstance(line, ClassCost) else len(_groups(view))
        if _sure(line.regret, tests) > 0 and line.regret.value >= NOTABLE * view.cost.value:
            text = f"the {view.view} decisions cost {where} {line.cost}, {line.regret} more than the best thresholds"
            yield _finding("decision", where, f"{text} on the same scores", line.regret)


def _of_scores(view: ViewCost) -> Iterator[Finding]:
    for c in view.classes:
        worse = _sure(c.gap, len(view.classes)) > NOTABLE and _sure(_negative(c.auroc_gap), len(view.classes)) > 0
        if worse:
            text = f"whatever the threshold, {c.name} is told worse: {c.gap} more of a mistake than the other classes"
            yield _finding("score", c.name, f"{text}, AUROC {c.auroc}", c.gap)
    for g in _groups(view):
        if _sure(g.gap, len(_groups(view))) > 0 and g.gap.value >= NOTABLE * view.score_bias.value:
            text = f"whatever the threshold, {g.name} costs {g.gap} more than other groups with the same mix of classes"
            yield _finding("score", g.name, text, g.gap)


def _groups(view: ViewCost) -> list[GroupCost]:
    return [g for g in view.groups if g.grouping != "all"]


def _sure(number: Number, tests: int) -> float:
    """The lower limit where so many are looked at; NaN where there is none."""
    more = NormalDist().inv_cdf(1 - FALSE / (2 * max(tests, 1))) / NormalDist().inv_cdf((1 + LEVEL) / 2)
    return number.value - more * (number.value - number.low)


def _negative(number: Number) -> Number:
    return Number(-number.value, -number.high, -number.low, number.n)


def _finding(bias: Literal["decision", "score"], where: str, text: str, number: Number) -> Finding:
    return Finding(bias, where, f"{text}, n = {number.n:,}", number.value, number.low, number.high, np.nan, number.n)


class _Bounded(NamedTuple):
    """Values [N], and by true class [K] the least and the most that they may be."""

    values: Floats
    least: Floats
    most: Floats

    def by_class(self, labels: Ints) -> Means:
        """[K]"""
        found = moments(self.values, labels, np.zeros_like(labels), (1, len(self.least)))
        value, low, high, n = means(found, self.least, self.most)
        return Means(value[0], low[0], high[0], n[0])

    def by_group(self, labels: Ints, groups: Ints, prior: Floats, count: int) -> Means:
        """[G] of so many groups."""
        return by_group(moments(self.values, labels, groups, (count, len(prior))), self.least, self.most, prior)

    def per(self, unit: Floats, labels: Ints) -> "_Bounded":
        """In units [K] of the true class; NaN where that is 0."""
        return _Bounded(divide(self.values, unit[labels]), divide(self.least, unit), divide(self.most, unit))


class _Costs(NamedTuple):
    """Of N decisions, of the oracle's, and of the first less the second."""

    actual: _Bounded
    remains: _Bounded
    regret: _Bounded


def _view(
    name: ViewName,
    ledger: Ledger,
    log_p: Floats,
    decisions: Ints,
    labels: Ints,
    cells: Ints,
    groupings: Sequence[Grouping],
    seed: int,
) -> ViewCost:
    costs, prior, k = ledger.costs, ledger.deployment_prior, len(ledger.classes)
    best = oracle(log_p, labels, costs, prior, seed)
    actual, remains = costs_of(costs, labels, decisions), costs_of(costs, labels, best)
    least, most = costs.min(1), costs.max(1)
    found = _Costs(
        _Bounded(actual, least, most),
        _Bounded(remains, least, most),
        _Bounded(actual - remains, least - most, most - least),
    )
    abstained = _Bounded(1.0 * (decisions == k), np.zeros(k), np.ones(k))
    cost, left, regret, undecided = (combined(b.by_class(labels), prior).at() for b in (*found, abstained))
    return ViewCost(
        view=name,
        cost=cost,
        decision_bias=regret,
        score_bias=left,
        abstained=undecided,
        classes=_class_costs(ledger, found, log_p, labels),
        groups=[line for grouping in groupings for line in _group_costs(grouping, prior, found, labels, cells)],
        curve=cost_curve(log_p, decisions, labels, prior, costs[:, k] if ledger.abstains else None),
    )


def _class_costs(ledger: Ledger, found: _Costs, log_p: Floats, labels: Ints) -> list[ClassCost]:
    k = len(ledger.classes)
    mistake = (ledger.costs[:, :k] * (1 - np.eye(k))).sum(1) / max(k - 1, 1)
    left, area = found.remains.per(mistake, labels).by_class(labels), auroc(log_p, labels, ledger.deployment_prior)
    columns = found.actual.by_class(labels), found.regret.by_class(labels), left, _gaps(left), area, _gaps(area)
    return [ClassCost(name, *(column.at(c) for column in columns)) for c, name in enumerate(ledger.classes)]


def _gaps(m: Means) -> Means:
    """[K] each less the mean of the others that have a value."""
    known = ~np.isnan(m.value)
    others = known & ~np.eye(len(known), dtype=bool)
    weights = np.eye(len(known)) - np.nan_to_num(divide(others, others.sum(1, keepdims=True)))
    absent = np.full(len(known), np.nan)
    return combined(m, weights) if known.sum() > 1 else Means(absent, absent, absent, m.n)


def _group_costs(grouping: Grouping, prior: Floats, found: _Costs, labels: Ints, cells: Ints) -> list[GroupCost]:
    groups, count = grouping.cells[cells], len(grouping.groups)
    cost, remains, regret = (b.by_group(labels, groups, prior, count) for b in found)
    values, least, most = found.remains
    gap = group_gaps(moments(values, labels, groups, (count, len(prior))), least, most, prior)
    columns = cost, regret, remains, gap
    return [
        GroupCost(grouping.name, name, *(column.at(g) for column in columns)) for g, name in enumerate(grouping.groups)
    ]
