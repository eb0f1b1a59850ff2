"""What only people know of a data set."""

from datetime import date
from typing import Literal

from data_loaders.settings import Settings


class About(Settings):
    """What only people know of a data set; a card says “not given” where nothing is."""

    name: str = ""
    """By default that of the folder."""
    description: str = ""
    """What it is, in a sentence or two."""
    license: str = ""
    """Its SPDX name (cc-by-4.0) or URL."""
    creator: str = ""
    """Who made it."""
    creator_kind: Literal["Person", "Organization"] = "Person"
    url: str = ""
    """Page of the data set."""
    citation: str = ""
    """How to cite it, best in BibTeX."""
    published: date | None = None
    """YYYY-MM-DD."""
    version: str = ""
    """MAJOR.MINOR.PATCH; by default the generation."""
    collection: str = ""
    """How, where and when the images were collected."""
    annotation: str = ""
    """Who gave the labels and the groups, and by which rules."""
    uses: str = ""
    """What it is meant for."""
    misuses: str = ""
    """What it must not be used for."""
    biases: str = ""
    """Biases that are known beyond those that can be counted."""
    limitations: str = ""
    """What it does not cover."""
    personal: str = ""
    """Personal or sensitive information in it, and consent."""
    impact: str = ""
    """On people, of its use."""
    maintenance: str = ""
    """Who keeps it, and how errors are reported."""
