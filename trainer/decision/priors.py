"""How often classes occur in use, estimated from images without labels, where only that differs from the validation
rows: label shift, p(x | y) as it was.

EM takes the prior of greatest likelihood (Saerens et al. 2002), after bias-corrected temperature scaling on the
validation rows, without which it is biased (Alexandari et al. 2020). BBSE solves M pi = mu, where mu is how often each
class is called, and M[i, j] how often class j is called i on the validation rows (Lipton et al. 2018).
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from data_loaders.faults import Fault, Refusal
from trainer.decision import label_shift
from trainer.decision.label_shift import UNSEEN, Method
from trainer.decision.ledger import Ledger
from trainer.decision.strata import Number, refuse_no_numbers
from trainer.decision.validation import Validation
from trainer.metrics.catalogue import Floats
from trainer.metrics.intervals import LEVEL
from trainer.metrics.tally import Ints

CONDITION = 30.0
"""Largest condition number that is not refused: 10,000 images then leave a standard error of up to 0.15 in a share."""
LEAST = 100
"""Images from which an estimate is made."""
FEW = 10
"""Validation rows of a class below which its column of M is a guess."""
CHANCE = 0.01
"""Level at which the images are told not to be a mixture of the validation classes."""
REPLICATES = 400
WORK = 2**27
"""Entries that all replicates may add up to; with more, there are fewer replicates, but LEAST."""


class PriorEstimate(NamedTuple):
    """Of a deployment prior."""

    method: Method
    prior: Floats
    """[K], sums to 1."""
    low: Floats
    """[K], interval at LEVEL over both the images and the validation rows (bootstrap, percentile)."""
    high: Floats
    condition: float
    """Condition number of M: 1 of a perfect classifier, infinite where two classes look the same to it."""
    weakest: tuple[str, ...]
    """Two classes whose shares are told apart worst."""
    n: int
    """Images that were used."""
    n_validation: int
    misfit: float
    """Chi-square distance of the calls, by class and confidence, to the mixture of the validation rows at `prior`."""
    p: float
    """Share of the replicates with as large a misfit where the images are such a mixture."""
    warnings: tuple[str, ...]

    def share(self, k: int) -> Number:
        return Number(float(self.prior[k]), float(self.low[k]), float(self.high[k]), self.n)

    def to_json(self) -> dict[str, Any]:
        return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in self._asdict().items()}


def estimate_prior(
    ledger: Ledger,
    logits: Floats,
    validation: Validation,
    method: Method = "em",
    cells: Ints | None = None,
    seed: int = 0,
) -> PriorEstimate:
    """Of the images whose logits [N, K] these are, in `cells` [N] where these are known.

    Refuses too few images, a class without validation rows, and classes that the model does not tell apart.
    """
    refuse_no_numbers(logits, "the images")
    refuse_no_numbers(validation.logits, "the validation rows")
    _refuse_too_few(ledger, len(logits), validation.labels)
    random = np.random.Generator(np.random.Philox(key=[seed, len(logits)]))
    rows = label_shift.sampled(ledger, logits, validation, cells, random)
    calibration = label_shift.calibrated(rows)
    calls = label_shift.called(rows, calibration)
    whole = label_shift.whole(rows)
    condition, weakest = label_shift.condition(calls, whole, ledger.classes)
    _refuse_ill_conditioned(condition, weakest)

    fit = partial(label_shift.fit, method, rows, calibration, calls)
    prior = fit(whole, rows.reference)
    smooth = label_shift.whole(rows, UNSEEN)
    expected, away = label_shift.by_class(calls, smooth) @ prior, label_shift.misfit(calls, smooth, prior)
    priors, distances = [], []
    for _ in range(int(np.clip(WORK // rows.images.size, LEAST, REPLICATES))):
        counts = label_shift.drawn(rows, random)
        priors.append(fit(counts, prior))
        distances.append(float(((label_shift.misfit(calls, counts, priors[-1]) - away) ** 2 / expected).sum()))
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(priors, [tail, 100 - tail], axis=0)
    misfit = float((away**2 / expected).sum())
    p = (1 + sum(distance >= misfit for distance in distances)) / (1 + len(distances))
    return PriorEstimate(
        method=method,
        prior=prior,
        low=np.minimum(low, prior),
        high=np.maximum(high, prior),
        condition=condition,
        weakest=weakest,
        n=len(rows.images),
        n_validation=len(rows.labels),
        misfit=misfit,
        p=p,
        warnings=tuple(_warnings(ledger, validation.labels, p)),
    )


def _refuse_too_few(ledger: Ledger, images: int, labels: Ints) -> None:
    faults = [
        Fault("the validation rows", f"none is of {name!r}", "give decision.prior, or validate on rows of every class")
        for name, n in zip(ledger.classes, np.bincount(labels, minlength=len(ledger.classes)), strict=True)
        if not n
    ]
    if images < LEAST:
        faults.append(Fault("the images", f"there are {images}, and {LEAST} are needed", "give decision.prior"))
    if faults:
        raise Refusal("The prior of use cannot be estimated:", faults, 65)


def _refuse_ill_conditioned(number: float, weakest: tuple[str, ...]) -> None:
    if number > CONDITION:
        what = f"the model hardly tells {' from '.join(weakest)}: its confusion has condition number {number:.3g}"
        fix = f"it may be {CONDITION:g} at most; give decision.prior, or train longer, or gather more of these classes"
        raise Refusal("The prior of use cannot be estimated:", [Fault("the validation rows", what, fix)], 65)


def _warnings(ledger: Ledger, labels: Ints, p: float) -> Iterator[str]:
    for name, n in zip(ledger.classes, np.bincount(labels, minlength=len(ledger.classes)), strict=True):
        if n < FEW:
            yield f"the share of {name!r} rests on {n} validation rows"
    if p <= CHANCE:
        yield f"the images are no mixture of the validation classes (p = {p:.2g}): more than the prior has changed"
