"""Images that are made smaller: their size, their colours, and when they stay as they are."""

import io

import numpy as np
import pytest
from PIL import Image

from data_loaders.decode import Undecodable, decode
from data_loaders.examine import examine
from data_loaders.recode import Resize

BLOCKS = np.kron([[0, 255], [90, 170]], np.ones((160, 240))).astype(np.uint8)
PICTURE = Image.fromarray(np.stack([BLOCKS, 255 - BLOCKS, BLOCKS], 2))
"""Of 480 x 320 pixels."""


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("form", ["jpeg", "webp", "png"])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_larger_image_is_made_smaller_and_always_to_the_same_bytes(kind, form):
    resize = Resize(longest=60, format=form)
    content = resize(encoded(PICTURE, kind))
    assert content == resize(encoded(PICTURE, kind))
    seen = examine(content)
    assert (seen.format, seen.width, seen.height) == (form.upper(), 60, 40)
    assert seen.quality == (90 if form == "jpeg" else 0)
    assert np.abs(decode(content)[::39, ::59].astype(int) - np.asarray(PICTURE)[::319, ::479]).max() <= 8


def test_a_picture_is_upright_afterwards_and_its_tags_are_gone():
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    content = Resize(longest=60)(encoded(PICTURE, "JPEG", exif=exif))
    with Image.open(io.BytesIO(content)) as image:
        assert (image.size, dict(image.getexif())) == ((40, 60), {})
    assert examine(Resize(longest=999)(encoded(PICTURE, "JPEG", exif=exif)))[1:3] == (320, 480)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_what_is_small_plain_and_of_the_format_stays_byte_for_byte(kind):
    for image in (PICTURE, PICTURE.convert("L")):
        content = encoded(image, kind)
        assert Resize(longest=480, format=kind.lower())(content) is content
        assert Resize(longest=479, format=kind.lower())(content) != content


@pytest.mark.parametrize("mode", ["CMYK", "P", "RGBA", "LA", "I;16"])
def test_what_is_not_plain_becomes_rgb_even_if_it_is_small(mode):
    deep = Image.fromarray(BLOCKS.astype(np.uint16) * 257)
    image = deep if mode == "I;16" else PICTURE.convert(mode)
    form = "jpeg" if mode == "CMYK" else "png"
    content = Resize(longest=480, format=form)(encoded(image, form))
    assert examine(content)[1:5] == (480, 320, 90 if mode == "CMYK" else 0, ())


def test_what_is_transparent_is_laid_over_white():
    content = Resize(longest=4, format="png")(encoded(Image.new("RGBA", (40, 40), (9, 9, 9, 0)), "PNG"))
    assert (decode(content) == 255).all()


def test_a_side_is_a_pixel_at_least():
    assert decode(Resize(longest=8)(encoded(Image.new("RGB", (900, 2)), "PNG"))).shape == (1, 8, 3)


def test_a_resize_of_what_is_no_image_is_refused():
    with pytest.raises(Undecodable, match="is not a"):
        Resize(longest=8)(b"GIF89a")
    with pytest.raises(Undecodable, match="more than the cap"):
        Resize(longest=8)(encoded(PICTURE, "PNG"), 480 * 320 - 1)
