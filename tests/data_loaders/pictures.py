"""Small sets of pictures that tests store and load."""

from pathlib import Path

import numpy as np
from PIL import Image

from data_loaders.ingest import Ingest, in_processes, ingest
from data_loaders.shards import Shards
from data_loaders.sources.folder import Folder
from data_loaders.splits import Splits


def path_of(folder: Path, number: int, suffix: str = "jpg") -> Path:
    """Where a picture lies: cats have even numbers, dogs have odd ones."""
    path = folder / ("cat", "dog")[number % 2] / f"{number}.{suffix}"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def noisy(seed: int, height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8))


def ingested(folder: Path, **shards) -> Path:
    """What is in a folder, all for training."""
    settings = Ingest(
        source=Folder(path=folder), out=folder.parent / "data", splits=Splits(val=0, test=0), shards=Shards(**shards)
    )
    ingest(settings, in_processes(1))
    return settings.out
