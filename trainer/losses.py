"""What training minimises, for each sample; the loop divides by the global batch, so that the mean is the same for any
number of workers. A loss also says which prior the logits end up conditioned on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, NonNegativeFloat

from data_loaders.settings import Settings
from trainer.metrics.catalogue import Floats

if TYPE_CHECKING:
    from torch import Tensor


class CrossEntropy(Settings):
    """-log p(label): a proper score, whose probabilities hold under the prior that the sampler drew."""

    kind: Literal["cross_entropy"] = "cross_entropy"

    def __call__(self, logits: Tensor, labels: Tensor, log_prior: Tensor) -> Tensor:
        """[B] of logits [B, K], labels [B] and the log of the training prior [K]."""
        from torch.nn import functional

        return functional.cross_entropy(logits, labels, reduction="none")

    def logit_prior(self, training_prior: Floats) -> Floats:
        """[K] the prior that softmax(logits) is conditioned on."""
        return training_prior


class BalancedSoftmax(Settings):
    """Cross-entropy of logits + tau log prior (Ren et al. 2020; Menon et al. 2021): takes the training prior out of the
    logits, wholly at tau = 1."""

    kind: Literal["balanced_softmax"] = "balanced_softmax"
    tau: NonNegativeFloat = 1.0

    def __call__(self, logits: Tensor, labels: Tensor, log_prior: Tensor) -> Tensor:
        """[B] of logits [B, K], labels [B] and the log of the training prior [K]."""
        from torch.nn import functional

        return functional.cross_entropy(logits + self.tau * log_prior, labels, reduction="none")

    def logit_prior(self, training_prior: Floats) -> Floats:
        """[K] the prior that softmax(logits) is conditioned on: ~ training prior ** (1 - tau)."""
        prior = training_prior ** (1 - self.tau)
        return prior / prior.sum()


AnyLoss = Annotated[CrossEntropy | BalancedSoftmax, Field(discriminator="kind")]
