"""docs/metrics.md lists every metric of the catalogue, and no other."""

import re
from pathlib import Path

from trainer.metrics.catalogue import FAIRNESS, JOINT, RATES

PAGE = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()


def test_every_metric_of_the_catalogue_has_a_line_in_the_docs():
    first_cells = [line.split("|")[1] for line in PAGE.splitlines() if line.startswith("| `")]
    named = [name for cell in first_cells for name in re.findall(r"`(\w+)`", cell)]
    assert sorted(named) == sorted([*RATES, *FAIRNESS, *JOINT])
