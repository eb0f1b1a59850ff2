"""All that a data set can be converted to."""

from typing import Annotated

from pydantic import Field

from data_loaders.export.folder import Folder
from data_loaders.export.parquet import HuggingFace
from data_loaders.export.webdataset import WebDataset

AnyTarget = Annotated[HuggingFace | WebDataset | Folder, Field(discriminator="kind")]
