"""How many altered copies of photographs an audit finds, by kind: python -m benchmarks.near_copies FOLDER

Each photograph in the folder is altered in each way; a copy is found if its look is near the original's and its details
agree. False pairs are those that are found among the photographs themselves: look at them, some may be copies.
"""

import io
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter

from data_loaders.audit.likeness import ALIKE, likeness
from data_loaders.audit.looks import pairs_within
from data_loaders.examine import small_grey
from data_loaders.formats.read import read_header
from data_loaders.look import LOOKS_ALIKE, look_of

RANDOM = np.random.default_rng(0)
AT_ONCE = 512
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
"""In capitals or not."""


def main(folder: Path) -> None:
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not paths:
        sys.exit(f"{folder} has no photograph: no file in it ends in {', '.join(SUFFIXES)}")
    began = time.process_time()
    originals = [seen(path.read_bytes()) for path in paths]
    each = (time.process_time() - began) / len(paths)
    print(f"{len(paths)} photographs, {each * 1e6:,.0f} us to look at one")
    print(f"{'kind':22}{'looks alike':>12}{'found':>8}{'likeness of 1 in 20 is below':>30}")
    shares = []
    for kind, alter in KINDS.items():
        altered = [seen(alter(Image.open(path).convert("RGB"))) for path in paths]
        near = np.array([(a[1] ^ b[1]).bit_count() <= LOOKS_ALIKE for a, b in zip(originals, altered, strict=True)])
        like = compared(np.stack([a[0] for a in originals]), np.stack([b[0] for b in altered]))
        shares.append(float((near & (like >= ALIKE)).mean()))
        print(f"{kind:22}{near.mean():12.1%}{shares[-1]:8.1%}{np.quantile(like, 0.05):30.2f}")
    print(f"{'all':22}{'':12}{np.mean(shares):8.1%}")
    looks = np.array([look for _, look in originals], np.uint64)
    parts = list(pairs_within(looks, np.arange(len(looks)), LOOKS_ALIKE))
    none = np.zeros(0, np.int64)
    a, b = (np.concatenate([none, *(part[side] for part in parts)]) for side in (0, 1))
    like = compared(np.stack([originals[i][0] for i in a]), np.stack([originals[i][0] for i in b])) if len(a) else a
    print(f"among {len(paths):,} photographs {len(a):,} pairs look alike, {(like >= ALIKE).sum():,} of them in detail")
    for i in np.flatnonzero(like >= ALIKE).tolist()[:20]:
        print(f"  {like[i]:.2f}  {paths[a[i]].name}  {paths[b[i]].name}")


def seen(content: bytes) -> tuple[np.ndarray, int]:
    picture = small_grey(content, read_header(content))
    return picture, look_of(picture)


def compared(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    parts = (slice(start, start + AT_ONCE) for start in range(0, len(a), AT_ONCE))
    return np.concatenate([likeness(a[part].astype(np.float32), b[part].astype(np.float32)) for part in parts])


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def cropped(share: float) -> Callable[[Image.Image], bytes]:
    """Without so much of its width and height, anywhere."""

    def crop(image: Image.Image) -> bytes:
        left, top = RANDOM.uniform(0, share, 2) * image.size
        width, height = (round(side * (1 - share)) for side in image.size)
        return encoded(image.crop((round(left), round(top), round(left) + width, round(top) + height)))

    return crop


def scaled(factor: float) -> Callable[[Image.Image], bytes]:
    return lambda image: encoded(image.resize((round(image.width * factor), round(image.height * factor))))


def gamma(power: float) -> Callable[[Image.Image], bytes]:
    return lambda image: encoded(image.point([round(255 * (value / 255) ** power) for value in range(256)] * 3))


def noisy(image: Image.Image) -> bytes:
    pixels = np.asarray(image) + RANDOM.normal(0, 8, (image.height, image.width, 3))
    return encoded(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)))


def captioned(image: Image.Image) -> bytes:
    image = image.copy()
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, image.height * 0.92, image.width, image.height), (0, 0, 0))
    draw.text((image.width * 0.1, image.height * 0.93), "a small caption", (255, 255, 255))
    return encoded(image, "JPEG")


def marked(image: Image.Image) -> bytes:
    image, (width, height) = image.copy(), image.size
    ImageDraw.Draw(image).rectangle((width * 0.7, height * 0.85, width * 0.97, height * 0.95), (255, 255, 255))
    return encoded(image, "JPEG")


KINDS: dict[str, Callable[[Image.Image], bytes]] = {
    "JPEG of quality 30": lambda image: encoded(image, "JPEG", quality=30),
    "JPEG of quality 95": lambda image: encoded(image, "JPEG", quality=95),
    "PNG": encoded,
    "WebP": lambda image: encoded(image, "WEBP", quality=75),
    "a third of the size": scaled(0.3),
    "twice the size": scaled(2.0),
    "crop of 2 %": cropped(0.02),
    "crop of 5 %": cropped(0.05),
    "brighter by 20 %": lambda image: encoded(ImageEnhance.Brightness(image).enhance(1.2)),
    "darker by 20 %": lambda image: encoded(ImageEnhance.Brightness(image).enhance(0.8)),
    "contrast + 20 %": lambda image: encoded(ImageEnhance.Contrast(image).enhance(1.2)),
    "contrast - 20 %": lambda image: encoded(ImageEnhance.Contrast(image).enhance(0.8)),
    "gamma 1.2": gamma(1.2),
    "gamma 0.8": gamma(0.8),
    "blur of 1.5 pixels": lambda image: encoded(image.filter(ImageFilter.GaussianBlur(1.5))),
    "noise of 8": noisy,
    "caption": captioned,
    "watermark": marked,
    "grey": lambda image: encoded(image.convert("L")),
}

if __name__ == "__main__":
    main(Path(sys.argv[1]))
