"""Decoding on a device, here the CPU, which torchvision's decoder takes as it takes a GPU."""

import numpy as np
import pytest
import torch
from pictures import ingested, path_of
from PIL import Image

from data_loaders import gpu
from data_loaders.augment import AnyAugmentation, PadCrop, Standard
from data_loaders.images import Encoded, Filler, Recipe
from data_loaders.index import DamagedRow, Index, open_index
from data_loaders.loader import Data, training_batches

TURNED = 6
"""EXIF orientation of one of the images."""


def smooth(seed: int, width: int, height: int) -> Image.Image:
    """A picture without edges, which all decoders and filters make alike."""
    small = np.random.default_rng(seed).integers(40, 215, (3, 3, 3)).astype(np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Index:
    """Six rows: upright JPEGs, one of them grey, one that is turned, and a PNG."""
    folder = tmp_path_factory.mktemp("photos")
    for k in range(6):
        path = path_of(folder / "images", k, "png" if k == 5 else "jpg")
        image = smooth(k, 90 + k, 70)
        exif = Image.Exif()
        exif[0x0112] = TURNED if k == 3 else 1
        file = image.convert("L") if k == 2 else image
        file.save(path, **({} if k == 5 else {"quality": 95, "subsampling": 0, "exif": exif}))
    return open_index(ingested(folder / "images"))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("augmentation", [Standard(area=(0.3, 1.0), flip_vertical=0.5), PadCrop(padding=6)])
def test_images_decoded_on_a_device_are_those_of_the_host_but_for_a_few_levels(photos: Index, augmentation, device):
    if device == "cuda" and not (torch.cuda.is_available() and gpu.is_here(torch.device("cuda"))):
        pytest.skip("no GPU that decodes JPEGs")
    rows = positions = np.arange(6)
    wanted = np.zeros((6, 32, 32, 3), np.uint8)
    Filler(photos, Recipe(32, "pillow", augmentation, 1)).fill(rows, positions, wanted)
    recipe, images = Recipe(32, "gpu", augmentation, 1), np.zeros((6, 32, 32, 3), np.uint8)
    filled = Filler(photos, recipe).fill(rows, positions, images)
    names = [photos.id_of(row) for row in rows.tolist()]
    assert [names[place] for place, _ in filled.files] == [n for n in names if n not in {"dog/3.jpg", "dog/5.png"}]
    assert not images[[place for place, _ in filled.files]].any()
    found = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).to(device)
    gpu.decode_into(found, encoded_of(photos, augmentation), photos)
    difference = np.abs(found.permute(0, 2, 3, 1).cpu().numpy().astype(int) - wanted)
    assert difference.mean() < 1.5
    assert difference.max() < 24  # at the borders of crops that are not whole pixels, and of what is shifted


def encoded_of(index: Index, augmentation: AnyAugmentation) -> Encoded:
    """As the loader hands it out: of all rows, in their order."""
    data = Data(path=index.folder, size=32, batch=6, augmentation=augmentation, decoder="gpu")
    (batch,) = training_batches(index, data, Listed(), 1, range(1))
    assert batch.encoded is not None
    return batch.encoded


class Listed:
    """A stream of all rows, in their order."""

    phases = (0,)

    def rows(self, positions: np.ndarray) -> np.ndarray:
        return positions

    def counts(self, start: int, stop: int) -> np.ndarray:
        raise NotImplementedError


def test_a_file_that_the_device_refuses_is_named_when_the_host_refuses_it_too(photos: Index):
    encoded = encoded_of(photos, PadCrop())
    broken = encoded._replace(files=[encoded.files[0][:200], *encoded.files[1:]])
    with pytest.raises(DamagedRow, match=r"row \d \("):
        gpu.decode_into(torch.zeros(6, 3, 32, 32, dtype=torch.uint8), broken, photos)


def test_without_a_gpu_nothing_is_decoded_there():
    assert not gpu.is_here(torch.device("cpu"))
