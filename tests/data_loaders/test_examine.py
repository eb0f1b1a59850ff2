"""What is learnt of an image: its facts against how it was made, its look against that of the whole picture."""

import io
from functools import lru_cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data_loaders.decode import Undecodable
from data_loaders.examine import examine
from data_loaders.look import ACROSS, DOWN, LOOKS_ALIKE, WAVES


@lru_cache(16)
def scene(seed: int, width: int = 160, height: int = 120) -> Image.Image:
    """Soft patches of colour."""
    patches = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), np.uint8)
    return Image.fromarray(patches).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def bits(a: bytes, b: bytes) -> int:
    return (examine(a).look ^ examine(b).look).bit_count()


def test_what_is_seen_is_what_was_made():
    seen = examine(encoded(scene(0), "JPEG", quality=83))
    assert seen[:5] == ("JPEG", 160, 120, 83, ())
    assert 0 < seen.look < 2**64
    assert examine(encoded(scene(0)))[:5] == ("PNG", 160, 120, 0, ())
    assert examine(encoded(scene(0), "WEBP"))[:5] == ("WEBP", 160, 120, 0, ())


@pytest.mark.parametrize("quality", range(1, 101))
def test_the_quality_of_a_jpeg_is_that_of_libjpeg(quality):
    assert examine(encoded(Image.new("RGB", (8, 8)), "JPEG", quality=quality), check="header").quality == quality


def test_the_quality_of_other_tables_is_the_nearest():
    tables = [[min(255, 3 * v + n % 2) for n, v in enumerate(range(1, 65))]] * 2
    assert 5 < examine(encoded(scene(0), "JPEG", qtables=tables), check="header").quality < 60


@pytest.mark.parametrize(
    ("image", "kind", "options", "notes"),
    [
        (scene(0).convert("CMYK"), "JPEG", {}, ("CMYK",)),
        (scene(0).convert("L"), "JPEG", {}, ("grey",)),
        (scene(0), "JPEG", {"progressive": True}, ("progressive",)),
        (scene(0).convert("L"), "PNG", {}, ("grey",)),
        (scene(0).convert("1"), "PNG", {}, ("grey",)),
        (scene(0).convert("LA"), "PNG", {}, ("grey", "transparent")),
        (scene(0).convert("RGBA"), "PNG", {}, ("transparent",)),
        (scene(0).convert("RGBA"), "WEBP", {"lossless": True}, ()),  # libwebp leaves out what is nowhere transparent
        (scene(0).quantize(), "PNG", {}, ("palette",)),
        (scene(0).quantize(), "PNG", {"transparency": 0}, ("palette", "transparent")),
        (Image.fromarray(np.zeros((3, 3), np.uint16)), "PNG", {}, ("16-bit", "grey")),
    ],
)
@pytest.mark.parametrize("check", ["header", "decode"])
def test_what_is_not_plain_is_noted(image, kind, options, notes, check):
    assert examine(encoded(image, kind, **options), check=check).notes == notes


def test_a_picture_within_another_and_a_turn_are_noted():
    image = scene(0)
    assert examine(encoded(image, "MPO", save_all=True, append_images=[image])).notes == ("multi-picture",)
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind in ("JPEG", "PNG", "WEBP"):
        seen = examine(encoded(image, kind, exif=exif))
        assert (seen.width, seen.height, seen.notes) == (120, 160, ("turned",))


def test_the_header_alone_tells_the_same_but_for_the_look():
    content = encoded(scene(0), "JPEG")
    assert examine(content, check="header") == examine(content)._replace(look=0)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_what_is_broken_within_is_found_by_decoding(kind):
    content = bytearray(encoded(scene(0, 400, 300), kind, quality=90))
    middle = len(content) // 2
    whole = examine(bytes(content))
    content[middle : middle + 2000] = bytes(2000)
    assert examine(bytes(content), check="header") == whole._replace(look=0)
    if kind == "PNG":
        with pytest.raises(Undecodable, match="is damaged"):
            examine(bytes(content))
    else:  # they have no checksum, and such data can be decoded: to another picture
        assert examine(bytes(content)).look != whole.look


def test_the_pixel_cap_holds_in_both_checks():
    for check in ("header", "decode"):
        assert examine(encoded(scene(0)), 160 * 120, check).width == 160
        with pytest.raises(Undecodable, match="claims 160 x 120 pixels, more than the cap of 19,199"):
            examine(encoded(scene(0)), 160 * 120 - 1, check)


def test_the_waves_of_a_look_are_whole_numbers_that_a_flat_picture_has_none_of():
    assert (np.rint(WAVES) == WAVES).all()
    assert (WAVES[1:].sum(1) == 0).all()
    assert len(set(zip(DOWN.tolist(), ACROSS.tolist(), strict=True)) - {(0, 0)}) == 64
    assert examine(encoded(Image.new("RGB", (50, 40), (9, 200, 30)))).look == 0


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_the_look_of_a_jpeg_at_a_part_of_its_size_is_that_of_the_whole(factor):
    for n in range(5):
        image = scene(n, 33 * factor + 3, 32 * factor + 5)
        assert bits(encoded(image, "JPEG", quality=100, subsampling=0), encoded(image)) <= 2


def test_the_look_is_of_the_upright_picture_over_white():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert bits(encoded(scene(0).transpose(Image.Transpose.ROTATE_90), exif=exif), encoded(scene(0))) <= 2
    clear = scene(0).convert("RGBA")
    clear.putalpha(Image.new("L", clear.size, 0))
    assert examine(encoded(clear)).look == 0
    clear.putalpha(255)
    assert bits(encoded(clear), encoded(scene(0))) == 0
    assert bits(encoded(scene(0).convert("CMYK"), "JPEG", quality=95), encoded(scene(0))) <= 4


@pytest.mark.parametrize("mode", ["P", "1", "L", "LA", "RGBA", "I;16"])
def test_every_kind_of_pixels_has_a_look(mode):
    image = scene(0, 1100, 500)  # larger than what is averaged whole
    deep = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    found = bits(encoded(deep if mode == "I;16" else image.convert(mode)), encoded(image))
    assert found <= LOOKS_ALIKE


@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from(["JPEG", "PNG", "WEBP"]), st.integers(0, 9))
def test_every_size_can_be_examined(width, height, kind, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    seen = examine(encoded(Image.fromarray(pixels), kind))
    assert (seen.width, seen.height) == (width, height)
