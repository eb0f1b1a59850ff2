"""Which calibrator a model gets, and how much better it makes its probabilities."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from data_loaders.faults import Fault, Refusal
from trainer.decision.calibrators import Fitted, Temperatures
from trainer.decision.fits import BOUNDS, FEW, AnyCalibrator, Best, Candidate, Rows, ordered
from trainer.decision.ledger import Ledger
from trainer.metrics.catalogue import Floats
from trainer.metrics.tally import Ints

FOLDS = 5
MOST = 2**22
"""Logits that a choice rests on; of more rows, every second, third, … of each class."""
CERTAIN = 1e-4
"""Nats; below it, every validation image is told with certainty, and any lower temperature does as well."""


class Scored(NamedTuple):
    """What cross-validation says of a candidate, in nats, under the prior of use."""

    kind: str
    spread: float | None
    nll: float
    standard_error: float
    gain: float
    """How much less that is than the NLL of the first candidate, on the same rows."""
    gain_standard_error: float


class Calibration(NamedTuple):
    """What calibration did, on the rows it was fitted on."""

    ledger: Ledger
    nll_before: float
    """Nats, under the deployment prior of the classes that have rows."""
    nll_after: float
    n: int
    kind: str
    """Which candidate was chosen."""
    spread: float | None
    candidates: tuple[Scored, ...]
    """The simplest first; empty where there was nothing to choose."""
    warnings: tuple[str, ...]
    """Why the calibrator may not be trusted; empty where nothing speaks against it."""

    def facts(self) -> dict[str, Any]:
        """What was chosen, and why, as JSON."""
        rule = f"the most gain over the first in {FOLDS}-fold cross-validation, less one standard error; else the first"
        return {
            "kind": self.kind,
            "spread": self.spread,
            "n": self.n,
            "nll_before": self.nll_before,
            "nll_after": self.nll_after,
            "rule": rule if self.candidates else "the only candidate",
            "candidates": [scored._asdict() for scored in self.candidates],
        }


def calibrate(
    ledger: Ledger, logits: Floats, labels: Ints, kind: AnyCalibrator = Best(), cells: Ints | None = None
) -> Calibration:
    """The ledger with a calibrator of this kind, fitted on these rows, weighted to the deployment prior.

    Logits [N, K], labels [N], cells [N] of the groups (-1 where unknown). A class without rows has no weight. Refuses
    logits that are no numbers. The same for any order of the rows.
    """
    cells = np.full(len(labels), -1) if cells is None else cells
    given = Rows(np.asarray(logits, np.float64), labels, cells, ledger.deployment_prior, ledger.logit_prior)
    if not len(labels):
        said = ("there is no validation image: nothing is calibrated",)
        return Calibration(ledger, np.nan, np.nan, 0, "none", None, (), said)
    _refuse_no_numbers(given)
    rows = ordered(given)
    candidates = kind.candidates(rows)
    scored = cross_validated(candidates, rows) if len(candidates) > 1 and len(labels) > 1 else ()
    chosen = candidates[surest(scored)]
    calibrator = chosen.fit(rows)
    before, after = (float(rows.weights @ rows.losses(c)) for c in (Temperatures(1.0), calibrator))
    calibrated = ledger.with_calibrator(calibrator)
    warnings = tuple(_warnings(ledger.classes, rows, calibrator, after))
    return Calibration(calibrated, before, max(after, 0.0), len(labels), chosen.kind, chosen.spread, scored, warnings)


def cross_validated(candidates: Sequence[Candidate], rows: Rows) -> tuple[Scored, ...]:
    """Each candidate on rows that it was not fitted on; parts are stratified by class, and a function of the rows."""
    rows = rows.take(slice(None, None, -(-rows.logits.size // MOST)))
    fold = np.arange(len(rows.labels)) % FOLDS
    losses = np.zeros((len(candidates), len(fold)))
    for left in np.unique(fold):
        others, held = rows.take(np.flatnonzero(fold != left)), rows.take(np.flatnonzero(fold == left))
        for c, candidate in enumerate(candidates):
            losses[c, fold == left] = held.losses(candidate.fit(others), rows.seen_shift)
    nll = losses @ rows.weights
    gain = losses[0] - losses
    columns = (nll, _standard_error(losses, rows.weights), gain @ rows.weights, _standard_error(gain, rows.weights))
    numbers = zip(*(column.tolist() for column in columns), strict=True)
    return tuple(Scored(c.kind, c.spread, *four) for c, four in zip(candidates, numbers, strict=True))


def surest(scored: Sequence[Scored]) -> int:
    """The candidate whose gain over the first, less one standard error, is the most; the first if none is above 0.

    The rule of one standard error (Breiman et al. 1984), but by the error of the difference, which is of the same rows,
    and from the simplest: so noise of bold candidates does not hide what a cautious one surely gains.
    """
    return int(np.argmax([s.gain - s.gain_standard_error for s in scored])) if scored else 0


def _standard_error(values: Floats, weights: Floats) -> Floats:
    """[C] of the means of values [C, N] under weights [N] of sum 1."""
    return np.sqrt((values - (values @ weights)[:, None]) ** 2 @ weights**2)


def _refuse_no_numbers(rows: Rows) -> None:
    wrong = np.count_nonzero(~np.isfinite(rows.logits).all(1))
    if wrong:
        said = f"of {wrong:,} of {len(rows.labels):,} validation images, the logits are not all finite numbers"
        raise Refusal("The model cannot be calibrated:", [Fault("model", said, "train it anew, at a lower rate")], 65)


def _warnings(classes: tuple[str, ...], rows: Rows, calibrator: Fitted, nll: float) -> list[str]:
    seen = np.bincount(rows.labels, minlength=len(classes))
    warnings = [f"no validation image of {name!r}" for name, n in zip(classes, seen, strict=True) if not n]
    if len(rows.labels) < FEW:
        warnings.append(f"the calibration rests on {len(rows.labels)} validation images")
    extreme = isinstance(calibrator, Temperatures) and not 1.1 * BOUNDS[0] < calibrator.overall < BOUNDS[1] / 1.1
    if nll < CERTAIN or extreme:
        warnings.append(f"the validation images do not settle the calibration ({calibrator})")
    return warnings
