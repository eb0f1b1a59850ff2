"""How far two pictures are one: whether their details agree once light, a small shift and a small zoom are undone.

What is alike at large, as two horses on a meadow are, has other details. All of it is linear algebra on small pictures.
"""

import numpy as np
from numpy.typing import NDArray

from data_loaders.look import SIDE

Pictures = NDArray[np.float32]
"""[N, SIDE, SIDE], grey."""

ALIKE = 0.8
"""Likeness of near copies: those of 20 kinds of alteration have more, but for one in a hundred."""
KEPT = 0.8
"""Part of the pixels that counts, those that agree best: the others may be under a caption."""
FURTHEST = 2.5
"""Pixels by which a picture may be moved: a crop of 5 % to one side moves its other side by 1.6."""
ROUNDS = 3
PLACE = (np.arange(SIDE) - (SIDE - 1) / 2) / (SIDE / 2)
"""Of a row or a column, -1 … 1."""
WINDOW = np.sin(np.pi * (np.arange(SIDE) + 0.5) / SIDE)
"""What each counts at first: captions and crops happen at the borders."""


def _blur() -> np.ndarray:
    """[SIDE, SIDE], a binomial over 5 pixels; the outermost one stands for those beyond."""
    places = np.arange(SIDE)[:, None] + np.arange(-2, 3)
    weights = np.array([1, 4, 6, 4, 1]) / 16
    return np.stack([np.bincount(row.clip(0, SIDE - 1), weights, SIDE) for row in places]).astype(np.float32)


BLUR = _blur()


def likeness(a: Pictures, b: Pictures) -> NDArray[np.float64]:
    """Correlation of the details of both, [N], at most 1."""
    weights = np.broadcast_to(np.outer(WINDOW, WINDOW).astype(np.float32).reshape(1, -1), (len(a), SIDE * SIDE))
    moves = np.zeros((len(a), 4), np.float32)
    for _ in range(2):
        found, weights = _moved(_warped(a, moves), b, weights)
        moves = moves + found
    return _correlation(_details(_warped(a, moves)), _details(b), weights)


def _moved(a: Pictures, b: Pictures, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shift and zoom, across and down, [N, 4], that bring a to b, and the pixels that agree after it, [N, pixels].

    Of first order (Lucas and Kanade 1981), with gain and offset of the light, by least squares that leave out the
    pixels which agree least and are done again.
    """
    a, b = _blurred(a), _blurred(b).reshape(len(b), -1)
    down, across = np.gradient(a, axis=(1, 2))
    x, y = PLACE.astype(np.float32), PLACE.astype(np.float32)[:, None]
    basis = np.stack([np.ones_like(a), a, across, across * x, down, down * y], 1).reshape(len(a), 6, -1)
    for _ in range(ROUNDS - 1):
        weights = _fit(basis, b, weights)[1]
    solved, weights = _fit(basis, b, weights)
    return solved[:, 2:] / np.maximum(solved[:, 1:2], 0.1), weights


def _fit(basis: np.ndarray, b: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shares of the basis, [N, 6], and which pixels then agree best, [N, pixels]."""
    weighted = basis * weights[:, None]
    normal = weighted @ basis.transpose(0, 2, 1) + 0.01 * np.eye(6, dtype=np.float32)  # a flat picture has no solution
    solved = np.linalg.solve(normal, weighted @ b[..., None])
    away = np.abs(b - (solved.transpose(0, 2, 1) @ basis)[:, 0])
    return solved[..., 0], (away <= np.quantile(away, KEPT, axis=1, keepdims=True)).astype(np.float32)


def _warped(a: Pictures, moves: np.ndarray) -> Pictures:
    """Pictures after shift and zoom, across and down."""
    across, down = (moves[:, i : i + 1] + moves[:, i + 1 : i + 2] * PLACE for i in (0, 2))
    return _taken(down) @ a @ _taken(across).transpose(0, 2, 1)


def _taken(by: np.ndarray) -> np.ndarray:
    """[N, SIDE, SIDE], that takes each row from so many rows further down, between two by their distance."""
    source = (np.arange(SIDE) + by.clip(-FURTHEST, FURTHEST)).clip(0, SIDE - 1)
    lower = np.floor(source).astype(np.int64).clip(0, SIDE - 2)
    taken = np.zeros((len(by), SIDE, SIDE), np.float32)
    np.put_along_axis(taken, lower[..., None], (1 - source + lower)[..., None].astype(np.float32), 2)
    np.put_along_axis(taken, lower[..., None] + 1, (source - lower)[..., None].astype(np.float32), 2)
    return taken


def _blurred(a: Pictures) -> Pictures:
    return BLUR @ a @ BLUR.T


def _details(a: Pictures) -> np.ndarray:
    return (a - _blurred(a)).reshape(len(a), -1)


def _correlation(a: np.ndarray, b: np.ndarray, weights: np.ndarray) -> np.ndarray:
    total = weights.sum(1, keepdims=True)
    a, b = (c - (weights * c).sum(1, keepdims=True) / total for c in (a, b))
    return (weights * a * b).sum(1) / np.sqrt(((weights * a * a).sum(1) + 0.01) * ((weights * b * b).sum(1) + 0.01))
