"""What a decision costs: the matrix C[y, d] of deciding d where y is true. The cheapest decision has the least expected
cost, sum_y C[y, d] p(y | x); for two classes that is a threshold at C_FP / (C_FP + C_FN) (Elkan 2001).

With a cost of abstaining r, a last column is r: an image whose cheapest class is expected to cost more is not decided,
the reject option of Chow (1970)."""

from typing import Annotated, Literal

import numpy as np
from pydantic import Field, NonNegativeFloat

from data_loaders.faults import Fault, Refusal
from data_loaders.settings import Settings
from trainer.metrics.catalogue import Floats

ABSTAIN = "abstain"
"""What the decision after the classes is called."""


class Costs(Settings):
    """What every kind of costs has."""

    abstain: NonNegativeFloat | None = None
    """Cost of leaving an image undecided, whatever it shows; null: every image is decided."""

    def _with_abstention(self, costs: Floats, classes: tuple[str, ...]) -> Floats:
        """[K, K] -> [K, K] or [K, K + 1]"""
        if self.abstain is None:
            return costs
        if ABSTAIN in classes:
            fault = Fault("decision.costs.abstain", f"a class is called {ABSTAIN!r}", "give the class another name")
            raise Refusal("The costs do not fit the data:", [fault])
        return np.column_stack([costs, np.full(len(costs), self.abstain)])


class Equal(Costs):
    """Every mistake costs 1: the cheapest decision is the most probable class, which favours the majority."""

    kind: Literal["equal"] = "equal"

    def matrix(self, classes: tuple[str, ...], prior: Floats) -> Floats:
        """[K, K] or [K, K + 1]"""
        return self._with_abstention(1.0 - np.eye(len(classes)), classes)


class Balanced(Costs):
    """Missing a class costs the inverse of how often it occurs: every class weighs the same, whatever its frequency."""

    kind: Literal["balanced"] = "balanced"

    def matrix(self, classes: tuple[str, ...], prior: Floats) -> Floats:
        """[K, K] or [K, K + 1], scaled so that deciding at random costs as much as it does under equal costs."""
        return self._with_abstention((1.0 - np.eye(len(classes))) / (len(classes) * prior[:, None]), classes)


class Matrix(Costs):
    """Costs of your own: `costs.rows.<true class>.<decision>`; what is not given is 0 on the diagonal, else 1."""

    kind: Literal["matrix"] = "matrix"
    rows: dict[str, dict[str, NonNegativeFloat]]

    def matrix(self, classes: tuple[str, ...], prior: Floats) -> Floats:
        """[K, K] or [K, K + 1]"""
        costs = 1.0 - np.eye(len(classes))
        faults = []
        for true, row in self.rows.items():
            for decision, cost in row.items():
                unknown = [name for name in (true, decision) if name not in classes]
                if unknown:
                    where = f"decision.costs.rows.{true}.{decision}"
                    faults.append(Fault(where, f"no class {unknown[0]!r}", f"there are: {', '.join(classes)}"))
                else:
                    costs[classes.index(true), classes.index(decision)] = cost
        if faults:
            raise Refusal("The costs do not fit the data:", faults)
        return self._with_abstention(costs, classes)


AnyCosts = Annotated[Equal | Balanced | Matrix, Field(discriminator="kind")]
