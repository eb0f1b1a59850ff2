"""Temperature scaling (Guo et al. 2017): the one number that makes probabilities mean what they say."""

from typing import NamedTuple

import numpy as np

from trainer.decision.ledger import Ledger
from trainer.metrics.catalogue import Floats
from trainer.metrics.tally import Ints

BOUNDS = (0.05, 20.0)
FEW = 100
CERTAIN = 1e-4
"""Nats; below it, every validation image is told with certainty, and any lower temperature does as well."""


class Calibration(NamedTuple):
    """What calibration did, on the rows it was fitted on."""

    ledger: Ledger
    nll_before: float
    """Nats, under the deployment prior."""
    nll_after: float
    n: int
    warnings: tuple[str, ...]
    """Why the temperature may not be trusted; empty where nothing speaks against it."""


def calibrate(ledger: Ledger, logits: Floats, labels: Ints) -> Calibration:
    """The ledger with the temperature of least NLL on these rows, [N, K] and [N], weighted to the deployment prior.

    A class without rows has no weight. The NLL is convex in 1 / temperature, so there is one optimum.
    """
    from scipy.optimize import minimize_scalar

    seen = np.bincount(labels, minlength=len(ledger.classes))
    weight = np.divide(ledger.deployment_prior, seen, out=np.zeros(len(seen)), where=seen > 0)[labels]
    weight /= weight.sum()

    def loss(log_temperature: float) -> float:
        log_p = ledger.with_temperature(float(np.exp(log_temperature))).log_probabilities(logits)
        return -float(weight @ log_p[np.arange(len(labels)), labels])

    found = minimize_scalar(loss, bounds=np.log(BOUNDS), method="bounded", options={"xatol": 1e-6})
    temperature = float(np.exp(found.x))
    warnings = [f"no validation image of {name!r}" for name, n in zip(ledger.classes, seen, strict=True) if not n]
    if len(labels) < FEW:
        warnings.append(f"the temperature rests on {len(labels)} validation images")
    if found.fun < CERTAIN or not 1.1 * BOUNDS[0] < temperature < BOUNDS[1] / 1.1:
        warnings.append(f"the validation images do not settle the temperature ({temperature:.2f})")
    calibrated = ledger.with_temperature(temperature)
    return Calibration(calibrated, loss(0.0), max(float(found.fun), 0.0), len(labels), tuple(warnings))
