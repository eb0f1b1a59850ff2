"""JPEGs decoded by nvJPEG on a GPU, and brought into their places there.

Only what is plain goes there: upright, RGB or grey, and a crop inside of the image; the host makes the rest. The whole
image is decoded, and the crop has whole pixels, so pixels differ from the host's by some levels at edges.
"""

import io
import warnings

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from data_loaders.augment import Placing, overlap
from data_loaders.decode import decode
from data_loaders.images import Encoded, made
from data_loaders.index import Index


def is_here(device: torch.device) -> bool:
    """Whether this torchvision decodes on a GPU."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "jpeg")
    try:
        return device.type == "cuda" and len(_pictures([file.getvalue()], device)) == 1
    except RuntimeError:
        return False


def decode_into(images: Tensor, encoded: Encoded, index: Index) -> None:
    """Decodes on the device of the images, uint8 [B, 3, size, size], and fills their places. Raises DamagedRow."""
    try:
        pictures = _pictures(encoded.files, images.device)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # it does not say which
        pictures = [_one(index, *one, images.device) for one in zip(encoded.rows, encoded.files, strict=True)]
    for place, picture in zip(encoded.places, pictures, strict=True):
        images[place] = _placed(picture, encoded.placing, place, images.shape[-1])


def _pictures(files: list[bytes], device: torch.device) -> list[Tensor]:
    from torchvision.io import ImageReadMode, decode_jpeg

    data = [torch.frombuffer(bytearray(file), dtype=torch.uint8) for file in files]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # since 0.29, in favour of TorchCodec
        return decode_jpeg(data, ImageReadMode.RGB, device=device)  # pyright: ignore[reportReturnType]


def _one(index: Index, row: int, file: bytes, device: torch.device) -> Tensor:
    """Of what the device refuses, the host decides."""
    try:
        return _pictures([file], device)[0]
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        return torch.from_numpy(made(index, row, file, decode)).permute(2, 0, 1).to(device)


def _placed(picture: Tensor, placing: Placing, place: int, size: int) -> Tensor:
    """[3, h, w] -> [3, size, size]"""
    left, top, width, height = placing.boxes[place].tolist()
    x, y = slice(int(left), int(np.ceil(left + width))), slice(int(top), int(np.ceil(top + height)))
    whole = interpolate(picture[None, :, y, x].float(), (size, size), mode="bilinear", antialias=True)
    made = whole[0].round_().clamp_(0, 255).to(torch.uint8)
    down, right = placing.shifts[place].tolist()
    if down or right:
        made = _shifted(made, down, right)
    axes = [axis for bit, axis in ((1, 2), (2, 1)) if placing.flips[place] & bit]
    return made.flip(axes) if axes else made


def _shifted(image: Tensor, down: int, right: int) -> Tensor:
    """By whole pixels; black comes in."""
    size, found = image.shape[-1], torch.zeros_like(image)
    (to_y, from_y), (to_x, from_x) = overlap(size, down), overlap(size, right)
    found[:, to_y, to_x] = image[:, from_y, from_x]
    return found
