"""Sets of classes that hold the true one with a stated probability, by split conformal prediction on validation rows.

A class is in the set of an image where its score is at most a quantile of the scores of the validation rows' true
classes (Vovk et al. 2005). That holds on average over all rows, or over those of each class (Mondrian: Vovk 2012) or
group, whatever the model, if rows of use are exchangeable with the validation rows. Where only the prior differs, each
validation row weighs as its class does in use (Podkopaev & Ramdas 2021). The calibrator was fitted on the same rows, so
the guarantee is as good as its few numbers are few beside them.
"""

from typing import Annotated, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from data_loaders.settings import Settings
from trainer.decision.strata import refuse_no_numbers
from trainer.decision.validation import Validation
from trainer.metrics.catalogue import Floats
from trainer.metrics.tally import Ints

By = Literal["none", "class", "group"]
Score = Literal["lac", "aps"]
ROUNDING = 1e-9
"""Of sums of weights, by a share of them."""


class Conformal(Settings):
    """Sets of classes beside the decision, which miss the true class of at most alpha of the images."""

    alpha: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    """Share of the images whose set may lack the true class."""
    by: By = "class"
    """Of which images that holds: of all together (none), of those of each class, or of those of each group, which is a
    combination of the values of all group columns."""
    score: Score = "lac"
    """lac gives the smallest sets (Sadinle et al. 2019); aps larger ones that are more even over images that are hard
    and easy (Romano et al. 2020, not randomised). A set of lac may be empty: the image is like no class."""


class Thresholds(NamedTuple):
    """Largest score with which a class is in the set."""

    of: Floats
    """[G + 1, K] by group and class; the last row is of images whose group is unknown (-1)."""
    n: Ints
    """[G + 1, K] validation rows that each rests on."""
    settings: Conformal

    @property
    def whole(self) -> NDArray[np.bool_]:
        """[G + 1, K] where there are too few validation rows to leave a class out: fewer than ceil(1 / alpha) - 1."""
        return np.isinf(self.of)

    def warnings(self, classes: tuple[str, ...], groups: list[str]) -> list[str]:
        """Which classes, or groups, always are in a set, or always get the whole one."""
        least = int(np.ceil(1 / self.settings.alpha)) - 1
        if self.settings.by == "class":
            always = [name for name, whole in zip(classes, self.whole[-1], strict=True) if whole]
            return [f"{name!r} is in every set: that needs {least} of its validation rows" for name in always]
        if self.settings.by == "group":
            always = [name for g, name in enumerate(groups) if self.whole[g].all()]
            return [f"{name!r} gets whole sets: that needs {least} of its validation rows" for name in always]
        return [f"all sets are whole: that needs {least} validation rows"] * bool(self.whole.all())


def scores(log_p: Floats, score: Score) -> Floats:
    """[N, K] how odd each class is where log p is [N, K]: 1 - p (lac), or the sum of all p at least as large (aps)."""
    p = np.exp(log_p)
    if score == "lac":
        return 1 - p
    order = np.argsort(-p, 1, kind="stable")
    found = np.empty_like(p)
    np.put_along_axis(found, order, np.take_along_axis(p, order, 1).cumsum(1).clip(max=1), 1)
    return found


def fit(log_p: Floats, validation: Validation, groups: int, prior: Floats, settings: Conformal) -> Thresholds:
    """From log p [V, K] of the validation rows under the prior [K] of use, in so many groups.

    Each class of the set has a threshold of its own, since the image's own weight depends on what its class would be.
    """
    refuse_no_numbers(log_p, "the validation rows")
    k = log_p.shape[1]
    labels, cells = validation.labels, validation.cells
    own = scores(log_p, settings.score)[np.arange(len(labels)), labels]
    counts = np.bincount(labels, minlength=k)
    weights = np.divide(prior * len(labels), counts, out=np.full(k, np.inf), where=counts > 0)
    of, n = np.full((groups + 1, k), np.inf), np.zeros((groups + 1, k), np.int64)
    match settings.by:
        case "none":
            of[:], n[:] = _quantile(own, weights[labels], weights, settings.alpha), len(labels)
        case "class":
            for c in range(k):
                of[:, c] = _quantile(own[labels == c], np.ones(counts[c]), np.ones(1), settings.alpha)
            n[:] = counts
        case "group":
            for g in np.unique(cells):
                rows = cells == g
                of[g], n[g] = _quantile(own[rows], weights[labels[rows]], weights, settings.alpha), rows.sum()
    return Thresholds(of, n, settings)


def sets(log_p: Floats, thresholds: Thresholds, cells: Ints | None = None) -> np.ndarray:
    """[N, K] bool, whether each class is in the set of each row; cells [N], -1 where unknown."""
    cells = np.full(len(log_p), -1) if cells is None else cells
    return scores(log_p, thresholds.settings.score) <= thresholds.of[cells]


def _quantile(values: Floats, weights: Floats, own: Floats, alpha: float) -> Floats:
    """[C] the smallest value such that values [V] up to it weigh 1 - alpha of all and of one more row of weight own
    [C], whose value is infinite; infinite where they do not."""
    order = np.argsort(values, kind="stable")
    sums = np.concatenate([[0.0], weights[order].cumsum()])
    with np.errstate(invalid="ignore"):
        wanted = (1 - alpha) * (sums[-1] + own)
    place = np.searchsorted(sums, wanted * (1 - ROUNDING)) - 1
    return np.append(values[order], np.inf)[np.clip(place, 0, len(values))]
