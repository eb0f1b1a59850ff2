"""What a model's logits mean, kept with the model: the prior they are conditioned on, what calibrates them, the prior
they meet in use, and what decisions cost. Decisions come from the ledger, never from a bare argmax.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from pydantic import PositiveFloat

from data_loaders.faults import Fault, Refusal
from data_loaders.settings import Settings
from trainer.decision.calibrators import Fitted, Temperatures, from_json, log_softmax
from trainer.decision.costs import AnyCosts, Balanced
from trainer.metrics.catalogue import Floats
from trainer.metrics.tally import Ints


class Decision(Settings):
    """Where the model will be used, and what its mistakes cost there."""

    prior: Literal["natural", "uniform"] | dict[str, PositiveFloat] = "natural"
    """How often each class occurs in use: as in the training split, equally, or `prior.<class>=…` (any scale)."""
    costs: AnyCosts = Balanced()
    """What it costs to decide d where y is true."""

    def ledger(self, classes: tuple[str, ...], natural: Floats, training: Floats, conditioned: Floats) -> "Ledger":
        """The ledger before calibration; priors are [K]."""
        deployment = self._prior(classes, natural)
        costs = self.costs.matrix(classes, deployment)
        return Ledger(classes, natural, training, conditioned, Temperatures(1.0), deployment, costs)

    def _prior(self, classes: tuple[str, ...], natural: Floats) -> Floats:
        if self.prior == "natural":
            return natural
        if self.prior == "uniform":
            return np.full(len(classes), 1 / len(classes))
        wrong = sorted(set(self.prior) ^ set(classes))
        if wrong:
            fix = f"give a share for each of: {', '.join(classes)}"
            raise Refusal("The prior does not fit the data:", [Fault("decision.prior", f"{wrong} are amiss", fix)])
        shares = np.array([float(self.prior[name]) for name in classes])  # pyright: ignore[reportArgumentType]
        return shares / shares.sum()


@dataclass(frozen=True)
class Ledger:
    """Priors are shares of the K classes, [K], in the order of `classes`."""

    classes: tuple[str, ...]
    natural_prior: Floats
    """In the training split as it lies on the disk."""
    training_prior: Floats
    """As the sampler really drew the classes."""
    logit_prior: Floats
    """That softmax(logits) is conditioned on: the training prior, unless the loss took it out."""
    calibrator: Fitted
    """From logits to calibrated ones, both conditioned on the logit prior."""
    deployment_prior: Floats
    costs: Floats
    """[K, K] or [K, K + 1], of deciding d (column) where y (row) is true; decision K is to abstain."""

    def log_probabilities(self, logits: Floats, prior: Floats | None = None, cells: Ints | None = None) -> Floats:
        """log p(y | x) in nats, [N, K], of logits [N, K], calibrated, where classes occur as in `prior` (by default in
        use): p_t(y | x) ~ p_s(y | x) pi_t(y) / pi_s(y) (Saerens et al. 2002).

        Only a temperature by group looks at cells [N] (-1 where unknown), numbered as the run's own index does.
        """
        target = self.deployment_prior if prior is None else prior
        return log_softmax(self.calibrator(logits, cells) + np.log(target) - np.log(self.logit_prior))

    def expected_costs(self, log_probabilities: Floats) -> Floats:
        """[N, K] or [N, K + 1], of each decision."""
        return np.exp(log_probabilities) @ self.costs

    def decide(self, log_probabilities: Floats) -> Ints:
        """[N], the decision of least expected cost."""
        return self.expected_costs(log_probabilities).argmin(1)

    @property
    def ungrouped(self) -> "Ledger":
        """Without what the calibrator has for single groups, whose cells other data number otherwise."""
        known = self.calibrator
        return self.with_calibrator(Temperatures(known.overall)) if isinstance(known, Temperatures) else self

    @property
    def abstains(self) -> bool:
        """Whether abstaining is a decision: the one after the classes."""
        return self.costs.shape[1] > len(self.classes)

    def with_calibrator(self, calibrator: Fitted) -> "Ledger":
        return replace(self, calibrator=calibrator)

    def under(self, decision: Decision) -> "Ledger":
        """The same model where classes and costs are as in `decision`."""
        ledger = decision.ledger(self.classes, self.natural_prior, self.training_prior, self.logit_prior)
        return ledger.with_calibrator(self.calibrator)

    def to_json(self) -> dict[str, Any]:
        priors = ("natural_prior", "training_prior", "logit_prior", "deployment_prior", "costs")
        return {"classes": list(self.classes), "calibrator": self.calibrator.to_json()} | {
            name: getattr(self, name).tolist() for name in priors
        }

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> "Ledger":
        arrays = {k: np.array(v, np.float64) for k, v in tree.items() if k not in ("classes", "calibrator")}
        return cls(classes=tuple(tree["classes"]), calibrator=from_json(tree["calibrator"]), **arrays)
