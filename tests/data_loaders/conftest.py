"""Small image files, and lists of them."""

import csv
from collections.abc import Callable, Sequence
from pathlib import Path

import hypothesis
import pytest
from PIL import Image

hypothesis.settings.register_profile("unhurried", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("unhurried")

List = Callable[..., Path]
CLASSES = ("cat", "dog")


@pytest.fixture
def shoot(tmp_path: Path) -> Callable[..., Path]:
    """Makes an image file under tmp_path, whose colour is a function of its name."""

    def shoot(name: str, size: tuple[int, int] = (7, 5), **options) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        colour = (sum(name.encode()) % 256, len(name) * 7 % 256, 90)
        Image.new("RGB", size, colour).save(path, **options)
        return path

    return shoot


@pytest.fixture
def listing_csv(tmp_path: Path) -> List:
    """Writes a CSV under tmp_path."""

    def listing_csv(rows: Sequence[Sequence[str]], name: str = "labels.csv") -> Path:
        with (tmp_path / name).open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)
        return tmp_path / name

    return listing_csv


@pytest.fixture
def photos(shoot: Callable[..., Path], listing_csv: List) -> Path:
    """A CSV of 40 good images: 2 classes x 2 venues x 10."""
    rows = [("path", "label", "venue", "patient")]
    for i in range(40):
        name = f"images/{i:02d}.png"
        shoot(name, size=(7 + i % 3, 5 + i % 5))
        rows.append((name, CLASSES[i % 2], ("home", "street")[i // 2 % 2], f"p{i // 4}"))
    return listing_csv(rows)
