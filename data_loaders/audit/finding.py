"""Something that is told from chance, in words and in numbers, whoever found it."""

from typing import Literal, NamedTuple

Bias = Literal[
    "class imbalance",
    "selection",
    "feature",
    "spatial",
    "leakage",
    "label noise",
    "score",
    "decision",
    "calibration",
    "underfitting",
    "overfitting",
]


class Finding(NamedTuple):
    """What stands out, with its evidence."""

    bias: Bias
    """Which bias it is, or is a sign of."""
    where: str
    """Class, group, property or split that it is about, such as `desserts` or `venue=street`."""
    text: str
    """One sentence, with its numbers."""
    value: float
    """What was measured; NaN where it is no number."""
    low: float
    high: float
    """Its interval at 95 %; NaN where there is none."""
    chance: float
    """What it would reach by chance in 95 of 100 cases; NaN where that is no question."""
    n: int
    """Rows it rests on."""
