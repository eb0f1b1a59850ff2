"""Classes of which the true posterior is known under any prior: Gaussians of unit variance."""

import numpy as np

from trainer.decision.ledger import Decision, Ledger
from trainer.decision.validation import Validation


def long_tail(classes: int, ratio: float) -> np.ndarray:
    prior = ratio ** (-np.arange(classes) / (classes - 1))
    return prior / prior.sum()


class Gaussians:
    """K classes in four dimensions."""

    def __init__(self, classes: int, spread: float, seed: int = 0) -> None:
        self.means = np.random.default_rng(seed).normal(0, spread, (classes, 4))
        self.classes = tuple(f"class {k}" for k in range(classes))

    def draw(self, n: int, prior: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Logits conditioned on the uniform prior, [N, K], and labels [N]."""
        random = np.random.default_rng(seed)
        labels = random.choice(len(prior), n, p=prior)
        return self.logits(self.means[labels] + random.normal(0, 1, (n, 4))), labels

    def logits(self, x: np.ndarray) -> np.ndarray:
        return -0.5 * ((x[:, None] - self.means) ** 2).sum(2)

    def ledger(self, natural: np.ndarray, decision: Decision | None = None) -> Ledger:
        uniform = np.full(len(natural), 1 / len(natural))
        return (decision or Decision()).ledger(self.classes, natural, uniform, uniform)


def validation(logits: np.ndarray, labels: np.ndarray, cells: np.ndarray | None = None) -> Validation:
    cells = np.zeros_like(labels) if cells is None else cells
    return Validation(logits.astype(np.float32).astype(np.float64), labels, cells, np.arange(len(labels)))
