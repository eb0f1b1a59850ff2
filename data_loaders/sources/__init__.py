"""Where images come from: each source is a stream of rows, with those that are rejected, and reads their bytes."""

from typing import Annotated

from pydantic import Field

from data_loaders.sources.csv_file import Csv
from data_loaders.sources.demo import Demo
from data_loaders.sources.folder import Folder
from data_loaders.sources.parquet import Parquet
from data_loaders.sources.torchvision import Torchvision
from data_loaders.sources.webdataset import WebDataset

AnySource = Annotated[Csv | Folder | Parquet | WebDataset | Torchvision | Demo, Field(discriminator="kind")]
