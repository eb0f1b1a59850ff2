"""Which labels are probably wrong, and whether there are more of them than a hard but clean data set has.

Confident learning (Northcutt, Jiang & Chuang 2021) counts rows that are confidently of another class than their label.
It counts the hard rows of clean data too: on the built-in images up to 17 %, where no label is wrong. So the alarm is
another number: the share of labels that no calibration of the model explains. The chance of a label is taken to be

    (1 - sum w) s(label | x) + w(label),      s = softmax(a z + b),

where z are out-of-sample logits, a and b calibrate them (Alexandari et al. 2020), and w(k) is the share of rows that
are labelled k blindly, whatever they show. Where classes only overlap, disagreement dies away as the model grows sure,
and w is 0; wrong labels are as frequent where it is sure, which makes them identifiable (Scott 2015). Rows of a class
that the model cannot see look the same as wrong labels: hence TOLERATED.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from data_loaders.audit.finding import Finding
from data_loaders.audit.summary import aligned
from data_loaders.index import Index
from data_loaders.loader import Data, exact_batches, ids_of
from trainer.checkpoint import Trained
from trainer.context import Local
from trainer.decision.ledger import log_softmax
from trainer.evaluate import logits_of
from trainer.metrics.intervals import Floats
from trainer.metrics.tally import Ints
from trainer.networks import Ensemble
from trainer.probe.paired import Number

TOLERATED = 0.02
"""Share of wrong labels above which all of the interval must lie; see benchmarks/label_noise.py for clean data."""
SUSPECTS = 100
"""Rows that are named, at most."""
DRAWS = 200
"""Of labels, for what chance shows."""
DROP = 1.92
"""Of the log-likelihood, to the ends of a 95 % interval: half the quantile of chi squared of one degree."""
LEAST, MOST = 1e-6, 0.95
"""Shares of blind labels that are looked at."""
GRID = 200
"""Of them, for a class."""
FLOOR = -200.0
"""Of logarithms of probabilities, which may underflow."""
FOLDS = 5
COMPONENTS = 128
"""Principal components of the features that a head sees, at most."""
RIDGE = 5.0
"""Of half the squared norm of a head's weights, on standardised features, against the sum of the NLL."""
TINY = 1e-6
"""Of the squared norm of offsets, which settles that of a class that never occurs."""
SEED = 3


class Blind(NamedTuple):
    """The formula of the module's text, fitted to N rows."""

    clean: Floats
    """[N, K] s, the probabilities of the true class before the label is seen."""
    shares: Floats
    """[K] w."""
    log_likelihood: float
    """Of all labels, in nats."""
    place: Floats
    """Of the optimum, [1 + 2 K]."""

    @property
    def wrong(self) -> float:
        """Share of the rows whose label is wrong."""
        return float(self.shares @ (1 - self.clean.mean(0)))


class ClassNoise(NamedTuple):
    """Of the rows that are labelled so."""

    name: str
    wrong: Number
    """Share whose label is wrong; its interval holds those of all fits within the interval of all labels."""
    counted: float
    """The same by confident learning."""
    counted_by_chance: float
    """What confident learning counts below in 95 of 100 cases if no label is wrong."""


class Suspect(NamedTuple):
    """A row whose label is probably wrong."""

    row: int
    id: str
    """Of the row, in its data set; empty where it is of none."""
    label: str
    likely: str
    """The most probable of the other classes."""
    wrong: float
    """Probability that the label is wrong."""
    margin: float
    """Probability of the label less the largest of another class: confident learning's normalised margin."""


class LabelErrors(NamedTuple):
    """Of labels of N rows."""

    wrong: Number
    """Share whose label is wrong, with its profile likelihood interval."""
    by_chance: float
    """What that share stays below in 95 of 100 cases if no label is wrong."""
    classes: list[ClassNoise]
    joint: list[list[float]]
    """[K, K] P(label, true class) by confident learning."""
    suspects: list[Suspect]
    """The most suspicious first."""


def of_model(trained: Trained, index: Index, rows: Ints) -> LabelErrors:
    """Of the labels of rows [N]. Of rows that the model has learnt from, new heads on its features speak, each for rows
    that it has not seen; that takes no training, and finds less the longer the model has had to memorise them."""
    labels, names, data = index.labels[rows], index.classes, trained.config.data
    device = next(trained.model.parameters()).device
    if (index.split[rows] == index.splits.index(data.train)).any():
        log_p = cross_fitted(features_of(trained.model, index, data, rows, device), labels, len(names))
    else:
        logits = logits_of(trained.model, index, data, rows, Local(index.folder, device))
        log_p = trained.ledger.log_probabilities(logits)
    found = label_errors(log_p, labels, names)
    listed = rows[[s.row for s in found.suspects]] if found.suspects else rows[:0]
    named = zip(found.suspects, listed.tolist(), ids_of(index, listed), strict=True)
    return found._replace(suspects=[s._replace(row=row, id=str(name)) for s, row, name in named])


def label_errors(log_p: Floats, labels: Ints, names: tuple[str, ...]) -> LabelErrors:
    """From out-of-sample log-probabilities [N, K], whatever their prior and temperature, and labels [N].

    Rows with what is no number are left out, and n says so.
    """
    known = np.flatnonzero((log_p < np.inf).all(1))  # neither is NaN
    log_p, labels = log_softmax(np.maximum(log_p[known], FLOOR)), labels[known]
    if not len(known):
        return _nothing(names)
    fit = blind(log_p, labels)
    low, high = _ends(log_p, labels, fit)
    wrong = Number(fit.wrong, min(low.wrong, fit.wrong), max(high.wrong, fit.wrong), len(labels))
    joint = confident_joint(fit.clean, labels)
    chance, counted_by_chance = _by_chance(fit)
    counted = noise_rates(joint)
    classes = [
        ClassNoise(name, _of_class((fit, low, high), labels, k), float(counted[k]), float(counted_by_chance[k]))
        for k, name in enumerate(names)
    ]
    return LabelErrors(wrong, chance, classes, joint.tolist(), _suspects(fit, labels, known, names))


def blind(log_p: Floats, labels: Ints, total: float | None = None, start: Floats | None = None) -> Blind:
    """The likeliest calibration and shares, by L-BFGS from `start`; `total` sets the sum of the shares."""
    from scipy.optimize import minimize

    n, k = log_p.shape
    row, own = np.arange(n), np.eye(k)[labels]

    def parts(place: Floats) -> tuple[Floats, Floats]:
        free = place[k + 1 :]
        shares = total * np.exp(log_softmax(free)) if total else np.exp(log_softmax(np.append(free, 0.0)))[:k]
        return np.exp(log_softmax(np.exp(place[0]) * log_p + place[1 : k + 1])), shares

    def loss(place: Floats) -> tuple[float, Floats]:
        clean, shares = parts(place)
        chance = _chance(clean[row, labels], shares, labels)
        given = shares[labels] / chance  # probability that the label was given blindly
        steps = (1 - given)[:, None] * (own - clean)
        by_class = np.bincount(labels, given, k)
        expected = shares * (by_class.sum() / total if total else n)
        offsets = place[1 : k + 1]
        slope = [[np.exp(place[0]) * (steps * log_p).sum()], steps.sum(0) - 2 * TINY * n * offsets, by_class - expected]
        return TINY * float(offsets @ offsets) - float(np.log(chance).mean()), -np.concatenate(slope) / n

    bounds = [(-6.0, 6.0)] + [(-30.0, 30.0)] * (2 * k)
    start = np.concatenate([np.zeros(k + 1), np.full(k, np.log(TOLERATED / k))]) if start is None else start
    found = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": 1000}).x
    clean, shares = parts(found)
    return Blind(clean, shares, float(np.log(_chance(clean[row, labels], shares, labels)).sum()), found)


def confident_joint(p: Floats, labels: Ints) -> Floats:
    """[K, K] P(label, true class) from out-of-sample probabilities [N, K] and labels [N].

    A row counts for the most probable of those classes whose probability reaches the mean that it has in rows labelled
    so (Northcutt, Jiang & Chuang 2021, equations 1 to 3). A label none of whose rows counts is taken to be right.
    """
    k = p.shape[1]
    n = np.bincount(labels, minlength=k)
    own = np.bincount(labels, p[np.arange(len(labels)), labels], k)
    reached = np.where(p >= np.divide(own, n, out=np.full(k, np.inf), where=n > 0), p, -1.0)
    true = reached.argmax(1)
    counted = reached[np.arange(len(labels)), true] >= 0
    counts = np.bincount((labels * k + true)[counted], minlength=k * k).reshape(k, k).astype(np.float64)
    none = counts.sum(1) == 0
    counts[none, none] = 1
    return counts / counts.sum(1, keepdims=True) * n[:, None] / n.sum()


def noise_rates(joint: Floats) -> Floats:
    """[K] share of the rows of each label that is of another class, of a joint [K, K]; NaN of a label without rows."""
    n = joint.sum(1)
    return 1 - np.divide(np.diag(joint), n, out=np.full(len(n), np.nan), where=n > 0)


def cross_fitted(features: Floats, labels: Ints, classes: int) -> Floats:
    """[N, K] log-probabilities of softmax heads with a ridge on features [N, D], each for a fold that it has not seen.

    The FOLDS folds have the same share of each class. Rows whose features are no numbers get none, and teach none.
    """
    known = np.flatnonzero(np.isfinite(features).all(1))
    out = np.full((len(labels), classes), np.nan)
    if not len(known):
        return out
    inputs, labels = _components(features[known]), labels[known]
    fold = _folds(labels)
    for f in range(FOLDS):
        rest, these = fold != f, fold == f
        if rest.any() and these.any():
            out[known[these]] = _log_head(_head(inputs[rest], labels[rest], classes), inputs[these])
    return out


@torch.inference_mode()
def features_of(model: nn.Module, index: Index, data: Data, rows: Ints, device: torch.device) -> Floats:
    """[N, D] what the head of the model sees of rows [N], in their order; the heads of all members, of an ensemble."""
    seen: list[Tensor] = []
    members: list[nn.Module] = list(model.members) if isinstance(model, Ensemble) else [model]
    heads = [[part for part in member.modules() if isinstance(part, nn.Linear)][-1] for member in members]
    hooks = [head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])) for head in heads]
    found = [np.zeros((0, sum(head.in_features for head in heads)))]
    for batch in exact_batches(index, data, rows):
        seen.clear()
        model(torch.from_numpy(batch.images[batch.valid]).to(device))
        found.append(torch.cat(seen, 1).double().cpu().numpy())
    for hook in hooks:
        hook.remove()
    return np.concatenate(found)


def findings(e: LabelErrors, split: str) -> Iterator[Finding]:
    """Whether labels of the split are wrong, beyond what is tolerated."""
    if e.wrong.low > TOLERATED and e.wrong.value > e.by_chance:
        worst = max(e.classes, key=lambda c: np.nan_to_num(c.wrong.low, nan=-1))
        text = (
            f"{e.wrong.value:.0%} of the labels of {split} are probably wrong, at least {e.wrong.low:.0%} "
            f"(by chance below {e.by_chance:.1%}, n = {e.wrong.n:,}); most of all, {worst.wrong.value:.0%} of those of "
            f"{worst.name}"
        )
        yield Finding("label noise", split, text, *e.wrong[:3], e.by_chance, e.wrong.n)


def summary(e: LabelErrors) -> str:
    """A short table for the terminal, the classes with most wrong labels first."""
    order = sorted(e.classes, key=lambda c: -np.nan_to_num(c.wrong.value, nan=-1))[:20]
    lines = [
        (c.name, str(c.wrong), f"{c.counted:.2f}", f"{c.counted_by_chance:.2f}", f"{c.wrong.n:,}")
        for c in [ClassNoise("all", e.wrong, np.nan, np.nan), *order]
    ]
    return aligned(("label", "wrong", "by confident learning", "of that by chance below", "n"), lines)


def _chance(own: Floats, shares: Floats, labels: Ints) -> Floats:
    """[N] of each label, where the true class has it with probability `own` [N]."""
    return np.maximum((1 - shares.sum()) * own + shares[labels], np.exp(FLOOR))


def _ends(log_p: Floats, labels: Ints, best: Blind) -> tuple[Blind, Blind]:
    """The fits of fewest and of most blind labels whose likelihood has not fallen by more than DROP."""
    low, high = (_end(log_p, labels, best, far) for far in (LEAST, MOST))
    return low, high


def _end(log_p: Floats, labels: Ints, best: Blind, far: float) -> Blind:
    """The last fit that is as likely, from the best sum of the shares to `far`."""
    k = len(best.shares)
    start = np.append(best.place[: k + 1], np.log(np.maximum(best.shares, LEAST**2)))
    near, found = float(np.clip(best.shares.sum(), LEAST, MOST)), best
    middle = far
    for _ in range(9):
        fit = blind(log_p, labels, middle, start)
        if fit.log_likelihood >= best.log_likelihood - DROP:
            near, found = middle, fit
        else:
            far = middle
        if near == far:
            break
        middle = float(np.sqrt(near * far))
    return found


def _of_class(fits: tuple[Blind, ...], labels: Ints, k: int) -> Number:
    """Share of wrong labels among those of class k, by the first fit; its interval holds those by all of them."""
    if not (labels == k).any():
        return Number(np.nan, np.nan, np.nan, 0)
    found = np.array([_likely_rates(fit, labels, k) for fit in fits])
    return Number(float(found[0, 0]), float(found.min()), float(found.max()), int((labels == k).sum()))


def _likely_rates(fit: Blind, labels: Ints, k: int) -> list[float]:
    """The rate of a class, and the least and the most of it where all else is given: then the log-likelihood of the
    share w of its label is the sum over its rows of log((1 - sum w) s + w), less the N w that all other labels lose."""
    own = fit.clean[labels == k, k]
    shares = np.append(fit.shares[k], np.append(0.0, np.geomspace(LEAST, MOST, GRID)))
    chance = np.maximum((1 - fit.shares.sum()) * own + shares[:, None], np.exp(FLOOR))
    likelihood = np.log(chance).sum(1) - len(labels) * shares
    rates = (shares[:, None] * (1 - own) / chance).mean(1)
    inside = rates[likelihood >= likelihood[1:].max() - DROP]
    return [float(rates[0]), float(inside.min(initial=rates[0])), float(inside.max(initial=rates[0]))]


def _by_chance(fit: Blind) -> tuple[float, Floats]:
    """95th percentiles of the share of wrong labels, and of what confident learning counts by class [K], where labels
    are drawn from the probabilities themselves."""
    random = np.random.Generator(np.random.Philox(key=[SEED, len(fit.clean)]))
    up_to, k = fit.clean.cumsum(1), len(fit.shares)
    wrong, counted = np.zeros(DRAWS), np.zeros((DRAWS, k))
    for draw in range(DRAWS):
        labels = np.minimum((up_to < random.random((len(up_to), 1))).sum(1), k - 1)
        wrong[draw] = float(_shares(fit.clean, labels) @ (1 - fit.clean.mean(0)))
        counted[draw] = noise_rates(confident_joint(fit.clean, labels))
    absent = np.isnan(counted).all(0)
    highest = np.nanpercentile(np.where(absent, 0.0, counted), 95, axis=0)
    return float(np.percentile(wrong, 95)), np.where(absent, np.nan, highest)


def _shares(clean: Floats, labels: Ints) -> Floats:
    """[K] the likeliest shares, given the calibration: expectation and maximisation, from above."""
    k, own = clean.shape[1], clean[np.arange(len(labels)), labels]
    shares = np.full(k, TOLERATED / k)
    for _ in range(50):
        shares = np.bincount(labels, shares[labels] / _chance(own, shares, labels), k) / len(labels)
    return shares


def _suspects(fit: Blind, labels: Ints, rows: Ints, names: tuple[str, ...]) -> list[Suspect]:
    place = np.arange(len(labels))
    own, others = fit.clean[place, labels], fit.clean.copy()
    others[place, labels] = -1.0
    wrong = fit.shares[labels] * (1 - own) / _chance(own, fit.shares, labels)
    first = [i for i in np.argsort(-wrong, kind="stable")[:SUSPECTS].tolist() if wrong[i] > 0.5]
    likely = others.argmax(1)
    return [
        Suspect(
            int(rows[i]), "", names[labels[i]], names[likely[i]], float(wrong[i]), float(own[i] - others[i, likely[i]])
        )
        for i in first
    ]


def _nothing(names: tuple[str, ...]) -> LabelErrors:
    none = Number(np.nan, np.nan, np.nan, 0)
    joint = np.full((len(names), len(names)), np.nan)
    return LabelErrors(none, np.nan, [ClassNoise(name, none, np.nan, np.nan) for name in names], joint.tolist(), [])


def _components(features: Floats) -> Floats:
    """[N, D'] the features, standardised; if there are many, their first principal components."""
    spread = features.std(0)
    scaled = (features - features.mean(0)) / np.where(spread > 0, spread, 1.0)
    if scaled.shape[1] <= COMPONENTS:
        return scaled
    _, vectors = np.linalg.eigh(scaled.T @ scaled)
    return scaled @ vectors[:, -COMPONENTS:]


def _folds(labels: Ints) -> Ints:
    """[N] fold of each row: the rows of a class, in random order, take turns."""
    random = np.random.Generator(np.random.Philox(key=[SEED, len(labels)]))
    order = random.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    fold = np.empty(len(labels), np.int64)
    fold[order] = np.arange(len(labels)) % FOLDS
    return fold


def _head(inputs: Floats, labels: Ints, classes: int) -> Floats:
    """[1 + D, K] offsets and weights of the head of least NLL with a ridge, by L-BFGS."""
    from scipy.optimize import minimize

    n, d = inputs.shape
    own = np.eye(classes)[labels]

    def loss(flat: Floats) -> tuple[float, Floats]:
        head = flat.reshape(d + 1, classes)
        log_p = _log_head(head, inputs)
        short = np.exp(log_p) - own
        slope = np.concatenate([short.sum(0, keepdims=True), inputs.T @ short]) + RIDGE * head
        return (float(RIDGE / 2 * (head**2).sum()) - float(log_p[np.arange(n), labels].sum())) / n, slope.ravel() / n

    start = np.zeros((d + 1) * classes)
    return minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 200}).x.reshape(d + 1, classes)


def _log_head(head: Floats, inputs: Floats) -> Floats:
    return log_softmax(inputs @ head[1:] + head[0])
