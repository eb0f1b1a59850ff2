"""Where images come from: every source lists rows, and the rows it had to reject."""

from typing import Annotated

from pydantic import Field

from data_loaders.sources.csv_file import Csv
from data_loaders.sources.demo import Demo
from data_loaders.sources.folder import Folder

AnySource = Annotated[Csv | Folder | Demo, Field(discriminator="kind")]
