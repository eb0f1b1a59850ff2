import io
import struct
import zlib
from collections.abc import Callable
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageOps, features

from data_loaders.decode import PIXEL_CAP, Undecodable, decode

ORIENTATION = ExifTags.Base.Orientation
PIXELS = np.random.default_rng(0).integers(0, 256, (12, 20, 3), np.uint8)
UNTURNED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.transpose(1, 0, 2),
    6: np.rot90,
    7: lambda upright: np.rot90(upright, 2).transpose(1, 0, 2),
    8: lambda upright: np.rot90(upright, -1),
}
"""EXIF orientation -> how a camera stores an upright picture under it."""


def encoded(pixels: np.ndarray | Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(np.ascontiguousarray(pixels))
    image.save(file, kind, **options)
    return file.getvalue()


def tags(*entries: tuple[int, int, int, bytes]) -> bytes:
    """EXIF of entries (tag, type, count, value), whatever they hold."""
    packed = b"".join(struct.pack("<HHI4s", *entry) for entry in entries)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + packed + bytes(4)


def png(width: int, height: int, data: bytes = b"", bits: int = 8, colour: int = 0) -> bytes:
    """A PNG that claims what it likes."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_a_lossless_image_comes_back_as_it_was(kind):
    found = decode(encoded(PIXELS, kind, lossless=True))
    assert (found.dtype, found.shape) == (np.uint8, (12, 20, 3))
    np.testing.assert_array_equal(found, PIXELS)


def test_a_jpeg_comes_back_nearly_as_it_was():
    smooth = np.linspace(0, 255, 12 * 20 * 3).reshape(12, 20, 3).astype(np.uint8)
    assert np.abs(decode(encoded(smooth, "JPEG", quality=95)).astype(int) - smooth).max() < 16


@pytest.mark.parametrize("orientation", UNTURNED)
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
def test_every_exif_orientation_comes_out_upright(orientation, kind):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    blocks = np.kron([[0, 255], [90, 170]], np.ones((16, 32))).astype(np.uint8)
    upright = np.stack([blocks, blocks, blocks], 2)
    content = encoded(UNTURNED[orientation](upright), kind, exif=exif, lossless=True, quality=100, subsampling=0)
    found = decode(content)
    assert found.shape == upright.shape
    assert np.abs(found.astype(int) - upright).max() <= 3


@pytest.mark.parametrize(
    "entry",
    [(3, 1, b"\0"), (3, 1, b"\x09"), (3, 1, b"\xff\xff"), (2, 2, b"6\0"), (7, 4, b"\6\0\0\0")],
)
def test_an_orientation_that_means_nothing_changes_nothing(entry):
    np.testing.assert_array_equal(decode(encoded(PIXELS, "PNG", exif=tags((ORIENTATION, *entry)))), PIXELS)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_an_odd_tag_beside_the_orientation_does_not_cost_the_picture(kind):
    orientation, odd = (ORIENTATION, 3, 1, b"\6"), (ExifTags.Base.XResolution, 2, 4, b"odd")
    content = encoded(UNTURNED[6](PIXELS), kind, exif=tags(orientation, odd), lossless=True)
    np.testing.assert_array_equal(decode(content), PIXELS)
    with Image.open(io.BytesIO(content)) as image, pytest.raises(TypeError):
        ImageOps.exif_transpose(image)  # the day that this passes, decode may use it


def test_what_is_transparent_is_laid_over_white():
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0, :, :3] = 10, 20, 30
    rgba[0, :, 3] = 255, 0, 128
    over_white = [[10, 20, 30], [255, 255, 255], [132, 137, 142]]
    for content in (encoded(rgba, "PNG"), encoded(rgba, "WEBP", lossless=True, exact=True)):
        np.testing.assert_allclose(decode(content)[0], over_white, atol=1)
    grey = Image.fromarray(np.array([[[40, 255], [40, 0]]], np.uint8), "LA")
    assert decode(encoded(grey, "PNG"))[0].tolist() == [[40] * 3, [255] * 3]


def test_a_palette_with_and_without_transparency_is_read():
    image = Image.new("P", (2, 1))
    image.putpalette([200, 10, 20, 0, 80, 160])
    image.putpixel((1, 0), 1)
    assert decode(encoded(image, "PNG"))[0].tolist() == [[200, 10, 20], [0, 80, 160]]
    assert decode(encoded(image, "PNG", transparency=1))[0].tolist() == [[200, 10, 20], [255] * 3]
    assert decode(encoded(image, "PNG", transparency=b"\xff\x00"))[0].tolist() == [[200, 10, 20], [255] * 3]


def test_sixteen_bits_of_grey_are_scaled_and_not_clipped():
    image = Image.fromarray(np.array([[0, 256, 32768, 65535]], np.uint16))
    assert decode(encoded(image, "PNG"))[0, :, 0].tolist() == [0, 1, 128, 255]
    exif = Image.Exif()
    exif[ORIENTATION] = 3
    assert decode(encoded(image, "PNG", exif=exif))[0, :, 1].tolist() == [255, 128, 1, 0]


def test_one_bit_and_eight_bits_of_grey_become_three_equal_channels():
    assert decode(encoded(Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1"), "PNG"))[0].tolist() == [
        [0] * 3,
        [255] * 3,
    ]
    assert decode(encoded(Image.fromarray(np.array([[0, 77]], np.uint8)), "PNG"))[0].tolist() == [[0] * 3, [77] * 3]


def test_cmyk_becomes_the_colours_that_it_prints():
    ink = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    assert np.abs(decode(encoded(ink, "JPEG", quality=100))[4, 4].astype(int) - [0, 255, 255]).max() <= 3


def test_the_second_picture_behind_a_phones_jpeg_does_not_matter():
    first, second = (Image.fromarray(np.full((16, 16, 3), value, np.uint8)) for value in (50, 200))
    content = encoded(first, "MPO", save_all=True, append_images=[second])
    with Image.open(io.BytesIO(content)) as image:
        assert (image.format, getattr(image, "n_frames", 1)) == ("MPO", 2)
    assert np.abs(decode(content).astype(int) - 50).max() <= 1


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_an_animation_is_refused(kind):
    assert features.check("webp")
    first, second = Image.fromarray(PIXELS), Image.fromarray(255 - PIXELS)
    with pytest.raises(Undecodable, match="is animated"):
        decode(encoded(first, kind, save_all=True, append_images=[second]))


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "ICO", "PPM", "PDF", "JPEG2000", "TGA"])
def test_other_formats_are_refused_whatever_their_name(kind):
    with pytest.raises(Undecodable, match="is not a JPEG, PNG, WEBP image"):
        decode(encoded(PIXELS, kind))


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "is empty"),
        (b"\0", "is not a JPEG, PNG, WEBP image"),
        (b"<svg/>", "is not a JPEG, PNG, WEBP image"),
        (b"\xff\xd8\xff", "is cut short"),
        (b"\x89PNG\r\n\x1a\n", "is cut short"),
        (b"RIFF\4\0\0\0WEBP", "has no picture"),
    ],
)
def test_what_is_no_image_is_refused(content, why):
    with pytest.raises(Undecodable, match=why):
        decode(content)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_an_image_that_is_cut_short_is_refused(kind, share):
    content = encoded(np.kron(PIXELS, np.ones((8, 8, 1), np.uint8)), kind)
    with pytest.raises(Undecodable):
        decode(content[: int(len(content) * share)])


@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "RGBA", "P", "1", "I;16"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_a_large_image_is_brought_to_rgb_in_strips_without_seams(mode, orientation, monkeypatch):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (9, 70, 4), np.uint8)).convert("L")
    image = Image.fromarray(np.asarray(image).astype(np.uint16) * 257) if mode == "I;16" else image.convert(mode)
    content = encoded(image, "PNG", exif=exif)
    whole = decode(content)
    monkeypatch.setattr("data_loaders.decode.STRIP", 150)
    np.testing.assert_array_equal(decode(content), whole)
    assert decode(content).flags.c_contiguous


def test_a_bomb_is_refused_by_its_header():
    with pytest.raises(Undecodable, match="pixels"):
        decode(png(60_000, 60_000))
    with pytest.raises(Undecodable, match=f"claims 8000 x 8001 pixels, more than the cap of {PIXEL_CAP:,}"):
        decode(png(8_000, 8_001))
    with pytest.raises(Undecodable, match="pixels"):
        decode(png(12_000, 9_000))


def test_the_pixel_cap_is_the_last_size_that_passes():
    content = png(2, 3, b"\0\1\2" * 3)
    assert decode(content, pixel_cap=6).shape == (3, 2, 3)
    with pytest.raises(Undecodable, match="claims 2 x 3 pixels, more than the cap of 5"):
        decode(content, pixel_cap=5)


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (2**31 - 1, 2**31 - 1), (2**32 - 1, 1)])
def test_sizes_that_cannot_be_are_refused(size):
    with pytest.raises(Undecodable):
        decode(png(*size))


def exif_seed(kind: str) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION], exif[ExifTags.Base.Make], exif[ExifTags.Base.XResolution] = 6, "maker", 72.0
    return encoded(PIXELS, kind, exif=exif)


SEEDS = [exif_seed("JPEG"), exif_seed("PNG"), exif_seed("WEBP"), encoded(Image.fromarray(PIXELS).convert("P"), "PNG")]


@given(st.sampled_from(SEEDS), st.lists(st.tuples(st.integers(0, 400), st.binary(max_size=4)), min_size=1, max_size=5))
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # Pillow warns of what it can do without
def test_hostile_bytes_are_an_image_or_undecodable_and_never_a_crash(content, edits):
    for at, new in edits:
        content = content[:at] + new + content[at + len(new) :]
    found = PIXELS
    with suppress(Undecodable):
        found = decode(content, pixel_cap=10_000)
    assert found.dtype == np.uint8
    assert found.ndim == found.shape[2] == 3
    assert 0 < found.shape[0] * found.shape[1] <= 10_000
