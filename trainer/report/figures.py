"""Figures as inline SVG, without script or style attributes, so that a page can forbid both."""

import numpy as np
from markupsafe import Markup

from trainer.metrics.calibration import coarse_bins
from trainer.metrics.intervals import divide, wilson
from trainer.metrics.tally import Tally

SIDE = 220
MARGIN = 34
STEP = 48

LINE = Markup('<line class="{}" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>')
RECT = Markup('<rect class="{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" fill-opacity="{:.3f}">{}</rect>')
POINT = Markup('<circle class="point" cx="{:.1f}" cy="{:.1f}" r="3">{}</circle>')
TEXT = Markup('<text class="{}" x="{:.1f}" y="{:.1f}">{}</text>')
TIP = Markup("<title>{}</title>")


def reliability(tally: Tally, title: str) -> Markup:
    """Accuracy against confidence in 15 bins, with Wilson intervals; a calibrated model lies on the diagonal. The bars
    along the foot are the share of samples in each bin."""
    n, right, confidence = np.moveaxis(coarse_bins(tally.overall())[0], 1, 0)
    x, y = divide(confidence, n), divide(right, n)
    low, high = wilson(right, n)
    parts = [*_axes("confidence", "accuracy"), LINE.format("ideal", *_at(0, 0), *_at(1, 1))]
    for k in np.flatnonzero(n):
        height = 0.3 * n[k] / n.sum() * SIDE
        left, foot = _at(k / len(n), 0)
        parts.append(RECT.format("mass", left + 1, foot - height, SIDE / len(n) - 2, height, 0.35, ""))
        parts.append(LINE.format("interval", *_at(x[k], low[k]), *_at(x[k], high[k])))
        tip = f"{y[k]:.2f} [{low[k]:.2f}, {high[k]:.2f}] at {x[k]:.2f}, n = {n[k]:,.0f}"
        parts.append(POINT.format(*_at(x[k], y[k]), TIP.format(tip)))
    return figure(parts, title, SIDE + 2 * MARGIN, SIDE + 2 * MARGIN)


def confusion(tally: Tally, classes: tuple[str, ...], title: str) -> Markup:
    """Rows are true classes, columns decisions; the shade is the share of the row, the number the count."""
    counts = tally.overall().confusion[0]
    shares = np.nan_to_num(divide(counts, counts.sum(1, keepdims=True)))
    left, top = 96, 30
    parts: list[Markup] = []
    for k, name in enumerate(classes):
        parts.append(TEXT.format("end", left - 6, top + STEP * (k + 0.6), _short(name, 13)))
        parts.append(TEXT.format("mid", left + STEP * (k + 0.5), top - 8, _short(name, 8)))
        for j, decision in enumerate(classes):
            x, y = left + STEP * j, top + STEP * k
            tip = TIP.format(f"{name} called {decision}: {counts[k, j]:,}, {shares[k, j]:.1%} of {name}")
            parts.append(RECT.format("right" if j == k else "wrong", x, y, STEP - 1, STEP - 1, shares[k, j], tip))
            parts.append(TEXT.format("mid", x + STEP / 2, y + 0.6 * STEP, f"{counts[k, j]:,}"))
    return figure(parts, title, left + STEP * len(classes) + 8, top + STEP * len(classes) + 8)


def figure(parts: list[Markup], title: str, width: float, height: float) -> Markup:
    return Markup(
        '<svg role="img" aria-label="{}" viewBox="0 0 {:.0f} {:.0f}" width="{:.0f}" height="{:.0f}">{}</svg>'
    ).format(title, width, height, width, height, Markup("").join(parts))


def _axes(x: str, y: str) -> list[Markup]:
    end = MARGIN + SIDE
    parts = [RECT.format("frame", MARGIN, MARGIN, SIDE, SIDE, 0, "")]
    for value in (0, 0.5, 1):
        parts.append(TEXT.format("mid", _at(value, 0)[0], end + 14, f"{value:g}"))
        parts.append(TEXT.format("end", MARGIN - 5, _at(0, value)[1] + 4, f"{value:g}"))
    return [*parts, TEXT.format("mid", MARGIN + SIDE / 2, end + 28, x), TEXT.format("start", 4, MARGIN - 12, y)]


def _at(x: float, y: float) -> tuple[float, float]:
    """Pixels of a point of the unit square."""
    return MARGIN + SIDE * float(x), MARGIN + SIDE * (1 - float(y))


def _short(name: str, most: int) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"
