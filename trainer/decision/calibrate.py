"""Temperature scaling (Guo et al. 2017): the one number that makes probabilities mean what they say."""

from typing import NamedTuple

import numpy as np
from scipy.optimize import minimize_scalar

from trainer.decision.ledger import Ledger
from trainer.metrics.catalogue import Floats
from trainer.metrics.tally import Ints

BOUNDS = (0.05, 20.0)


class Calibration(NamedTuple):
    """What calibration did, on the rows it was fitted on."""

    ledger: Ledger
    nll_before: float
    """Nats, under the deployment prior."""
    nll_after: float
    n: int


def calibrate(ledger: Ledger, logits: Floats, labels: Ints) -> Calibration:
    """The ledger with the temperature of least NLL on these rows, [N, K] and [N], weighted to the deployment prior.

    A class without rows has no weight. The NLL is convex in 1 / temperature, so there is one optimum.
    """
    seen = np.bincount(labels, minlength=len(ledger.classes))
    weight = np.divide(ledger.deployment_prior, seen, out=np.zeros(len(seen)), where=seen > 0)[labels]
    weight /= weight.sum()

    def loss(log_temperature: float) -> float:
        log_p = ledger.with_temperature(float(np.exp(log_temperature))).log_probabilities(logits)
        return -float(weight @ log_p[np.arange(len(labels)), labels])

    found = minimize_scalar(loss, bounds=np.log(BOUNDS), method="bounded", options={"xatol": 1e-6})
    return Calibration(ledger.with_temperature(float(np.exp(found.x))), loss(0.0), float(found.fun), len(labels))
