"""What a model said of the validation rows, kept with it: for what is fitted after training."""

from typing import NamedTuple

from trainer.metrics.catalogue import Floats
from trainer.metrics.tally import Ints


class Validation(NamedTuple):
    """Of N rows that the weights never met."""

    logits: Floats
    """[N, K] as the network gives them, float32."""
    labels: Ints
    """[N]"""
    cells: Ints
    """[N] cell of all group columns, as `Index.cells` numbers them."""
    rows: Ints
    """[N] rows of the data set."""
