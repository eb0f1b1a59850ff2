"""What training minimises, for each sample. A loss is settings; bound to what is known of the data, it is a criterion.

A step minimises sum w l / sum w, both over the whole batch of all workers, so that the gradient is the same for any
number of them. Cross-entropy with weights w[k] is least where softmax(logits) ~ prior[k] w[k] p(x | k), with the prior
that the sampler draws. What each loss leaves of the prior, and the ledger takes out again, is its `logit_prior`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field, NonNegativeFloat, PositiveFloat

from data_loaders.index import Ints
from data_loaders.settings import Fraction, Settings
from trainer.metrics.catalogue import Floats

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    Formula = Callable[[Tensor, Tensor, Tensor], Tensor]

LEAST = 1e-12
"""Least share: a class that a phase never draws has a logarithm, and no group of the DRO is lost for good."""
SCALE = 2**30
"""Of the fixed point in which losses are added up, so that the sum has the same bits for any number of workers."""


@dataclass(frozen=True)
class Known:
    """What a loss knows of the data, in one phase of the stream."""

    sizes: Ints
    """Training rows of each class in each cell (intersection of the group columns), [G, K]."""
    prior: Floats
    """How often the stream draws each class, [K]."""
    scale: float = 1.0
    """Of the model's logits: that of a cosine classifier, else 1."""

    @property
    def rows(self) -> Ints:
        """Training rows of each class, [K]."""
        return self.sizes.sum(0)

    @property
    def log_prior(self) -> Floats:
        """[K]"""
        return np.log(np.maximum(self.prior, LEAST))


class Equal(Settings):
    """Every class weighs the same."""

    kind: Literal["equal"] = "equal"

    def raw(self, rows: Ints) -> Floats:
        """Weights of classes that have so many rows, both [K], in any scale."""
        return np.ones(len(rows))


class Power(Settings):
    """n ** -gamma, for a class of n training rows."""

    kind: Literal["power"] = "power"
    gamma: NonNegativeFloat = 1.0
    """1 weighs classes as if all were as large, 0.5 goes half the way."""

    def raw(self, rows: Ints) -> Floats:
        return rows.astype(np.float64) ** -self.gamma


class EffectiveNumber(Settings):
    """1 / the effective number of a class's n training rows, (1 - beta ** n) / (1 - beta) (Cui et al. 2019)."""

    kind: Literal["effective_number"] = "effective_number"
    beta: Fraction = 0.9999
    """0 weighs all classes the same; the nearer to 1, the nearer to 1 / n."""

    def raw(self, rows: Ints) -> Floats:
        return (1 - self.beta) / (1 - self.beta ** rows.astype(np.float64))


AnyWeights = Annotated[Equal | Power | EffectiveNumber, Field(discriminator="kind")]


@dataclass(frozen=True)
class Criterion:
    """A loss over the data of one phase, with its tensors on the device."""

    formula: Formula
    """Losses of each head, [B, M], of logits [B, M, K], labels [B] and cells [B]."""
    by_class: Tensor
    """Weights of the classes, float32 [K]."""
    begins: float
    """The progress at which they come into force."""
    state: Tensor
    """What a loss that is adaptive begins with, float64; else empty."""

    def losses(self, logits: Tensor, labels: Tensor, cells: Tensor) -> Tensor:
        """Unweighted losses [B] in float32 or finer, of logits [B, K] or, of several heads, [B, M, K]: their mean."""
        import torch

        exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return self.formula(exact if exact.ndim == 3 else exact[:, None], labels, cells).mean(1)

    def weights(self, labels: Tensor, cells: Tensor, progress: float) -> Tensor:
        """[B], at a share of the run's steps in [0, 1)."""
        found = self.by_class[labels]
        return found if progress >= self.begins else found.new_ones(len(found))

    def adapt(
        self,
        state: Tensor,
        losses: Tensor,
        labels: Tensor,
        cells: Tensor,
        total: Callable[[Tensor], Tensor],
        shares: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Of a loss that is adaptive: the state after a step, and the weights [B] with which the step minimises
        sum share w l, divided by nothing.

        A worker gives its detached losses, labels and cells, [B], and the shares by which they count, those of the
        labels in mixed images; `total` adds a tensor over all workers, each of which must call it.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class WorstGroups(Criterion):
    """The state is the weight of each group, [groups]."""

    by_label: bool
    eta: float
    handicap: Tensor
    """Added to the mean loss of each group, [groups]."""

    def adapt(
        self,
        state: Tensor,
        losses: Tensor,
        labels: Tensor,
        cells: Tensor,
        total: Callable[[Tensor], Tensor],
        shares: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        import torch

        groups = cells * len(self.by_class) + labels if self.by_label else cells
        counted = torch.ones_like(losses) if shares is None else shares
        sound = losses.isfinite()  # a step with others is not taken, but the state is to be gone on with
        counted, losses = counted * sound, losses.where(sound, 0)
        parts = (torch.stack((losses * counted, counted)).double() * SCALE).round().long()
        totals = total(parts.new_zeros(2, len(state)).index_add_(1, groups, parts)).double() / SCALE
        there = totals[1] > 0
        n = totals[1].where(there, 1)
        rise = (self.eta * (totals[0] / n + self.handicap)).where(there, -torch.inf)
        grown = (state * (rise - rise.max()).exp()).clamp_min(LEAST) * there
        state = torch.where(there, grown * ((state * there).sum() / grown.sum()), state)
        return state, (state / n)[groups].to(losses.dtype)


class Loss(Settings):
    """What all losses have."""

    adaptive: ClassVar[bool] = False
    """Whether the weights follow the losses of the whole batch, through `Criterion.adapt`."""

    @property
    def heads(self) -> int | None:
        """How many heads the model must have; None where any number will do."""
        return None

    @abstractmethod
    def bind(self, known: Known, device: torch.device) -> Criterion:
        """The loss over such data."""

    @abstractmethod
    def logit_prior(self, training_prior: Floats, known: Known, progress: float = 1.0) -> Floats:
        """[K] the prior that softmax(logits) is conditioned on at a share of the run's steps, where classes are drawn
        as in `training_prior`."""


class Weighted(Loss):
    """A loss that weighs classes. The logits are conditioned on ~ prior * weights, once these are in force."""

    weights: AnyWeights = Equal()
    """Of the classes."""
    deferred: Fraction = 0.0
    """Share of the run's steps that pass before the weights come into force (DRW, Cao et al. 2019: 0.8)."""

    @property
    def removed(self) -> float:
        """The power of the prior that the loss takes out of the logits."""
        return 0.0

    @abstractmethod
    def formula(self, known: Known, tensor: Callable[[Floats], Tensor]) -> Formula:
        """Losses of each head, [B, M], of logits [B, M, K], labels [B] and cells [B]."""

    def bind(self, known: Known, device: torch.device) -> Criterion:
        import torch

        tensor = partial(torch.as_tensor, dtype=torch.float32, device=device)
        state = torch.empty(0, dtype=torch.float64, device=device)
        return Criterion(self.formula(known, tensor), tensor(self._by_class(known)), self.deferred, state)

    def logit_prior(self, training_prior: Floats, known: Known, progress: float = 1.0) -> Floats:
        weights = self._by_class(known) if progress >= self.deferred else 1.0
        prior = training_prior * weights / np.exp(self.removed * known.log_prior)
        return prior / prior.sum()

    def _by_class(self, known: Known) -> Floats:
        """The weights, [K], of mean 1."""
        raw = self.weights.raw(known.rows)
        return raw / raw.mean()


class Smoothed(Weighted):
    """Cross-entropy of adjusted logits, whose targets may be smoothed. Smoothing flattens the probabilities, so the
    prior of the logits holds only approximately; the calibrator mends the rest."""

    smoothing: Fraction = 0.0
    """Share of the target that is spread evenly over all classes."""
    tail_smoothing: Fraction | None = None
    """The same of the smallest class, while `smoothing` is of the largest: label-aware smoothing (Zhong et al. 2021),
    0.3 to 0 on CIFAR-10-LT. By default as `smoothing`."""

    @abstractmethod
    def adjust(self, known: Known, tensor: Callable[[Floats], Tensor]) -> Formula:
        """Adjusted logits [B, M, K] of logits [B, M, K], labels [B] and cells [B]."""

    def formula(self, known: Known, tensor: Callable[[Floats], Tensor]) -> Formula:
        adjust = self.adjust(known, tensor)
        if not self.smoothing and not self.tail_smoothing:
            return lambda logits, labels, cells: cross_entropy(adjust(logits, labels, cells), labels)
        shares = tensor(self._smoothing(known.rows))

        def losses(logits: Tensor, labels: Tensor, cells: Tensor) -> Tensor:
            adjusted, share = adjust(logits, labels, cells), shares[labels, None]
            return (1 - share) * cross_entropy(adjusted, labels) - share * adjusted.log_softmax(2).mean(2)

        return losses

    def _smoothing(self, rows: Ints) -> Floats:
        """Of each class, [K]; between tail and head it rises as a quarter of a sine over n."""
        head, tail = self.smoothing, self.smoothing if self.tail_smoothing is None else self.tail_smoothing
        place = 1 - (rows.max() - rows) / max(rows.max() - rows.min(), 1)
        return tail + (head - tail) * np.sin(np.pi / 2 * place)


class CrossEntropy(Smoothed):
    """-log p(label): a proper score, whose probabilities hold under the prior that the sampler drew."""

    kind: Literal["cross_entropy"] = "cross_entropy"

    def adjust(self, known: Known, tensor: Callable[[Floats], Tensor]) -> Formula:
        return lambda logits, labels, cells: logits


class BalancedSoftmax(Smoothed):
    """Cross-entropy of logits + tau log prior (Ren et al. 2020; logit adjustment, Menon et al. 2021): takes the prior
    out of the logits, which are conditioned on ~ prior ** (1 - tau)."""

    kind: Literal["balanced_softmax"] = "balanced_softmax"
    tau: NonNegativeFloat = 1.0

    @property
    def removed(self) -> float:
        return self.tau

    def adjust(self, known: Known, tensor: Callable[[Floats], Tensor]) -> Formula:
        shift = tensor(self.tau * known.log_prior)
        return lambda logits, labels, cells: logits + shift


class Focal(Weighted):
    """-(1 - p) ** gamma log p(label), with p unweighted (Lin et al. 2017); with weights of effective numbers it is the
    class-balanced focal loss. No proper score: its probabilities are too flat, which the calibrator mends, and the
    prior of the logits is that of cross-entropy only approximately."""

    kind: Literal["focal"] = "focal"
    gamma: NonNegativeFloat = 2.0
    """How much samples that are right already are played down."""

    def formula(self, known: Known, tensor: Callable[[Floats], Tensor]) -> Formula:
        import torch

        def losses(logits: Tensor, labels: Tensor, cells: Tensor) -> Tensor:
            nll = cross_entropy(logits, labels)
            return (-torch.expm1(-nll)).clamp_min(LEAST) ** self.gamma * nll

        return losses


class Ldam(Smoothed):
    """Cross-entropy after a margin ~ n ** -1/4, wider for rare classes, is taken from the label's own logit (Cao et al.
    2019). Meant for a cosine head; with deferred weights it is LDAM-DRW. The prior of the logits is that of
    cross-entropy only approximately, as the margins lift those of rare classes."""

    kind: Literal["ldam"] = "ldam"
    margin: NonNegativeFloat = 0.5
    """Of the smallest class, in units of the cosine."""

    def adjust(self, known: Known, tensor: Callable[[Floats], Tensor]) -> Formula:
        from torch.nn import functional

        rows = known.rows
        margins = tensor(known.scale * self.margin * (rows.min() / rows) ** 0.25)
        return lambda logits, labels, cells: logits - (margins * functional.one_hot(labels, len(rows)))[:, None]


class VectorScaling(Smoothed):
    """VS: cross-entropy of (n / largest n) ** gamma logits + tau log prior (Kini et al. 2021). Of what it does to the
    prior only the additive part is exact, ~ prior ** (1 - tau): the factors are a warp that the calibrator mends."""

    kind: Literal["vs"] = "vs"
    gamma: NonNegativeFloat = 0.2
    """Above 0, the logits of rare classes count less in training, and so grow more."""
    tau: NonNegativeFloat = 1.0
    by_group: bool = False
    """Whether n and prior are those of each class in the sample's own cell (group-VS), given that rows of a class are
    drawn equally often; a class without rows there counts as one row."""

    @property
    def removed(self) -> float:
        return self.tau

    def adjust(self, known: Known, tensor: Callable[[Floats], Tensor]) -> Formula:
        sizes = np.maximum(known.sizes, 1) if self.by_group else known.rows[None]
        factor = tensor((sizes / sizes.max()) ** self.gamma)
        shift = tensor(self.tau * (known.log_prior + np.log(sizes / known.rows)))

        def adjusted(logits: Tensor, labels: Tensor, cells: Tensor) -> Tensor:
            here = cells if self.by_group else cells.new_zeros(len(cells))
            return logits * factor[here, None] + shift[here, None]

        return adjusted


class BalPoe(Smoothed):
    """Balanced product of experts: each head m of the model learns with logits + taus[m] log prior (Aimar et al. 2023),
    and the mean of their logits is conditioned on ~ prior ** (1 - mean tau). Its recipe has mixup, which calibrates."""

    kind: Literal["balpoe"] = "balpoe"
    taus: Annotated[tuple[NonNegativeFloat, ...], Field(min_length=1)] = (0.0, 1.0, 2.0)
    """Of each head of the model."""

    @property
    def heads(self) -> int:
        return len(self.taus)

    @property
    def removed(self) -> float:
        return float(np.mean(self.taus))

    def adjust(self, known: Known, tensor: Callable[[Floats], Tensor]) -> Formula:
        shift = tensor(np.outer(self.taus, known.log_prior))
        return lambda logits, labels, cells: logits + shift.expand(logits.shape[1:])


class GroupDro(Loss):
    """Cross-entropy of the worst groups (Sagawa et al. 2020): sum q mean loss over the groups, q growing with the loss.

    A step multiplies q of the groups that its batch has, over all workers, by exp(eta mean loss), and brings their sum
    back to what it was. A group that is absent keeps its q and adds no loss; one without training rows has q = 0. Wants
    strong penalties, or an early stop. The prior of the logits is the one that is drawn only approximately: q moves it,
    by how much depends on the model, and the calibrator mends that.
    """

    kind: Literal["group_dro"] = "group_dro"
    adaptive: ClassVar[bool] = True
    eta: PositiveFloat = 0.01
    """How fast the weights of groups follow their losses."""
    adjustment: NonNegativeFloat = 0.0
    """C: groups count as if their loss were C / sqrt(n) larger, as small ones generalise worse."""
    over: Literal["group", "label_and_group"] = "label_and_group"
    """What a group is: a cell of the group columns, or a class within one."""

    def bind(self, known: Known, device: torch.device) -> Criterion:
        import torch

        sizes = torch.from_numpy(known.sizes).double().to(device)
        n = sizes.flatten() if self.over == "label_and_group" else sizes.sum(1)
        state = (n > 0).double() / (n > 0).sum()
        handicap = self.adjustment / n.clamp_min(1).sqrt()
        equal = torch.ones(len(known.prior), device=device)
        return WorstGroups(_plain, equal, 0.0, state, self.over == "label_and_group", self.eta, handicap)

    def logit_prior(self, training_prior: Floats, known: Known, progress: float = 1.0) -> Floats:
        return training_prior


AnyLoss = Annotated[
    CrossEntropy | BalancedSoftmax | Focal | Ldam | VectorScaling | BalPoe | GroupDro, Field(discriminator="kind")
]


def _plain(logits: Tensor, labels: Tensor, cells: Tensor) -> Tensor:
    return cross_entropy(logits, labels)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """-log p(label) of each head, [B, M], of logits [B, M, K] and labels [B]."""
    from torch.nn import functional

    each = labels[:, None].expand(logits.shape[:2])
    return functional.cross_entropy(logits.flatten(0, 1), each.flatten(), reduction="none").view(each.shape)
