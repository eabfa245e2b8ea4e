"""Small anti-aliased pictures: lines and discs drawn at twice the resolution, then reduced by a Lanczos filter.

Everything is rounded to 8 bits as an image library would, so that a picture depends on nothing but arithmetic.
"""

from __future__ import annotations

import functools
import math

import numpy as np

ANTIALIAS = 2
_LOBES = 3


def direction(degrees: float) -> tuple[float, float]:
    """(y, x) of the unit vector at an angle: (sin, cos)."""
    angle = math.radians(degrees)
    return math.sin(angle), math.cos(angle)


def round_up(value: float) -> int:
    """Ceiling; what differs from an integer by rounding error is that integer."""
    return math.ceil(round(value, 9))


@functools.cache
def disc(radius: int) -> np.ndarray:
    """(points, 2) offsets (y, x) with y^2 + x^2 <= radius^2."""
    side = np.arange(-radius, radius + 1)
    y, x = np.meshgrid(side, side, indexing="ij")
    inside = y**2 + x**2 <= radius**2
    return np.stack([y[inside], x[inside]], 1)


def line(side: int, end: tuple[int, int], width: int) -> np.ndarray:
    """(side, side) bool: a line ``width`` pixels thick from the middle to the pixel ``middle + end``.

    Pixel for pixel what Pillow's ``ImageDraw.line`` sets, since the original draws with it.
    """
    picture = np.zeros((side, side), dtype=bool)
    middle, (dy, dx) = side // 2, end
    if width == 1:
        steps = max(abs(dy), abs(dx), 1)
        for step in range(steps + 1):
            picture[middle + _away(dy * step / steps), middle + _away(dx * step / steps)] = True
        return picture
    half = (width - 1) / 2 / math.hypot(dy, dx)
    across = (_away(half * dx), -_toward(half * dy))  # from the line to one of its long sides
    ends = ((0, 0), (dy, dx))
    low, high = ([(y + sign * across[0], x + sign * across[1]) for y, x in ends] for sign in (-1, 1))
    corners = [*low, *reversed(high)]
    for y in range(min(y for y, _ in corners), max(y for y, _ in corners) + 1):
        crossed = [x for edge in zip(corners, corners[1:] + corners[:1], strict=True) for x in _crossings(y, *edge)]
        first, last = math.floor(min(crossed) + 0.5), math.ceil(max(crossed) - 0.5)
        picture[middle + y, middle + first : middle + last + 1] = True
    return picture


def _crossings(y: int, begin: tuple[int, int], end: tuple[int, int]) -> list[float]:
    """Where an edge meets the row ``y``; both ends of an edge that lies in it."""
    if not min(begin[0], end[0]) <= y <= max(begin[0], end[0]):
        return []
    if begin[0] == end[0]:
        return [begin[1], end[1]]
    return [begin[1] + (end[1] - begin[1]) * (y - begin[0]) / (end[0] - begin[0])]


def _away(value: float) -> int:
    """To the nearest integer, halves away from zero."""
    return math.floor(value + 0.5) if value >= 0 else -math.floor(0.5 - value)


def _toward(value: float) -> int:
    """To the nearest integer, halves toward zero."""
    return math.ceil(value - 0.5) if value >= 0 else -math.ceil(-value - 0.5)


def dilate(picture: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """True at every one of ``offsets`` from a True pixel; what falls outside is cut off."""
    margin = int(np.abs(offsets).max(initial=0))
    result = np.zeros([side + 2 * margin for side in picture.shape], dtype=bool)
    reached = np.argwhere(picture)[:, None] + offsets + margin
    result[reached[..., 0], reached[..., 1]] = True
    return result[margin : margin + picture.shape[0], margin : margin + picture.shape[1]]


def reduce(picture: np.ndarray) -> np.ndarray:
    """(2 n + 1 or 2 n) square picture in [0, 255] to 8 bits at half the size, rounded up: (n + 1 or n) square."""
    small = (picture.shape[0] + 1) // ANTIALIAS
    weights = _lanczos(picture.shape[0], small)
    return _eight_bits(weights @ _eight_bits(picture @ weights.T))


def _eight_bits(values: np.ndarray) -> np.ndarray:
    """0 to 255, halves up: a sum that is a half but for the order of its terms is a half on every machine."""
    return np.clip(np.floor(np.round(values, 9) + 0.5), 0, 255)


@functools.cache
def _lanczos(size: int, small: int) -> np.ndarray:
    """(small, size) weights of a windowed sinc of three lobes, stretched by size / small."""
    scale = size / small
    centers = (np.arange(small) + 0.5) * scale
    distance = (np.arange(size) + 0.5 - centers[:, None]) / scale
    weights = np.where(np.abs(distance) < _LOBES, np.sinc(distance) * np.sinc(distance / _LOBES), 0.0)
    return weights / weights.sum(1, keepdims=True)
