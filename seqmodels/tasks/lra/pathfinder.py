"""Pathfinder (Linsley et al., arXiv 1805.08315) with Long Range Arena's settings, contour length 14.

Two dashed paths ("snakes") among shorter ones; a disc marks one end of the first or second, another disc the
other end of the same path (label 1) or of the other one (label 0). Each path grows paddle by paddle: a pivot
behind its head, a candidate pixel on a circle about the pivot, chosen with probability in proportion to
(1 - occupied) cos^2(min(c |turn|, pi / 2)). Pictures are stretched to 0..255.

Coordinates are (y, x); an angle's direction is (sin, cos).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from seqmodels.tasks.lra.draws import Draws
from seqmodels.tasks.lra.raster import ANTIALIAS, dilate, direction, disc, line, reduce, round_up

_CIRCLE = np.array([direction(degrees) for degrees in range(360)])
BORDER = 1
CROWDED = 1.8  # two paddles' masks may touch, not cross
SEED_TRIES, EXTEND_TRIES, DISTRACTOR_TRIES = 3, 3, 5
FREE_SHARE = 0.01  # no more distractors once fewer pixels are free


class Settings(NamedTuple):
    """Sizes in pixels.

    Attributes:
        side: of the picture.
        paddle, thickness: of a paddle (the thickness is half its drawn width at double resolution).
        margins: half the gap between paddles; one is drawn for each picture.
        paddles: of a target.
        distractors: how many, of ``paddles // 3`` paddles.
        seed_distance: between the two targets' first pixels.
        continuity: c above.
        marker: radius of a disc.
        contrast, distractor_contrast: factors on the paddles of each.
    """

    side: int
    paddle: int
    thickness: float
    margins: tuple[int, ...]
    paddles: int
    distractors: int
    seed_distance: int
    continuity: float
    marker: float
    contrast: float
    distractor_contrast: float


SETTINGS = {
    32: Settings(32, 2, 0.5, (1,), 14, 5, 7, 1.0, 1.5, 1.5, 2.0),
    128: Settings(128, 5, 1.5, (2, 3), 14, 8, 20, 1.8, 3.0, 0.9, 0.9),
}


class Picture(NamedTuple):
    """``pixels`` (side, side) uint8, ``label``, and what the tests look at: paths and distractors drawn."""

    pixels: np.ndarray
    label: int
    paths: tuple[list[tuple[int, int]], list[tuple[int, int]]]
    distractors: int


class _Failed(Exception):
    """A path that cannot go on, or cannot begin."""


class _Window(NamedTuple):
    """The part of a small picture that lies inside a large one, and where."""

    values: np.ndarray
    place: tuple[slice, slice]

    def over(self, picture: np.ndarray) -> np.ndarray:
        return picture[self.place]

    def paste(self, picture: np.ndarray, factor: float = 1.0) -> None:
        """``picture`` becomes the larger of the two, in place."""
        np.maximum(self.over(picture), factor * self.values, out=self.over(picture))


class _Snake:
    """One growing path: its paddles, the last one's mask, its tips, where it turns next."""

    def __init__(self, canvas: _Canvas, tail: tuple[int, int], degrees: float) -> None:
        y, x = direction(degrees)
        picture, self.mask = canvas.paddle(tail, degrees)
        self.drawn = [picture]
        self.angle = math.radians(degrees)
        head = (tail[0] + canvas.settings.paddle * y, tail[1] + canvas.settings.paddle * x)
        reach = canvas.settings.paddle + canvas.margin
        self.pivot = (head[0] - reach * y, head[1] - reach * x)
        self.tips = [tail]  # the first pixel, then the far end of every paddle

    def extend(self, canvas: _Canvas, occupied: np.ndarray) -> np.ndarray:
        """One paddle more; the occupied pixels with the paddle before it."""
        settings = canvas.settings
        stride = settings.paddle + 2 * canvas.margin
        pivot = (self.pivot[0] + stride * math.sin(self.angle), self.pivot[1] + stride * math.cos(self.angle))
        pixels = canvas.circle(pivot)
        if not len(pixels):
            raise _Failed
        angles = np.arctan2(pixels[:, 0] - pivot[0], pixels[:, 1] - pivot[1])
        turns = np.abs((angles - self.angle + math.pi) % (2 * math.pi) - math.pi)
        smooth = np.cos(np.minimum(settings.continuity * turns, math.pi / 2)) ** 2
        weights = np.maximum(0.0, 1 - canvas.highest_near(occupied, pixels)) * np.where(smooth > 1e-12, smooth, 0.0)
        if weights.sum() <= 0:
            raise _Failed
        for _ in range(EXTEND_TRIES):
            chosen = canvas.draws.weighted(weights)
            tip = (int(pixels[chosen, 0]), int(pixels[chosen, 1]))
            picture, mask = canvas.paddle(tip, math.degrees(angles[chosen]) + 180)
            if (mask.over(occupied) + mask.values).max() < CROWDED:
                break
        else:
            raise _Failed
        occupied = occupied.copy()
        self.mask.paste(occupied)
        self.drawn.append(picture)
        self.mask = mask
        self.pivot, self.angle = pivot, float(angles[chosen])
        self.tips.append(tip)
        return occupied


class _Canvas:
    """Sizes, the random numbers, and how paddles are drawn on a picture of this size."""

    def __init__(self, settings: Settings, draws: Draws) -> None:
        self.settings, self.draws = settings, draws
        self.margin = settings.margins[draws.below(len(settings.margins))]
        self.radius = settings.paddle + math.ceil(settings.thickness) + self.margin  # of a paddle's window

    def inside(self, pixel: tuple[int, int]) -> bool:
        return all(0 <= part < self.settings.side for part in pixel)

    def at(self, start: tuple[float, float], degrees: float, length: float) -> tuple[int, int]:
        y, x = direction(degrees)
        return round_up(start[0] + length * y), round_up(start[1] + length * x)

    def window(self, degrees: float) -> tuple[np.ndarray, np.ndarray]:
        """(2 radius + 1) square: a paddle from the middle, and its mask, both 0 to 255."""
        side = 2 * self.radius * ANTIALIAS + 1
        y, x = direction(degrees)
        length = self.settings.paddle * ANTIALIAS
        fine = line(side, (round_up(length * y), round_up(length * x)), round(self.settings.thickness * ANTIALIAS))
        wide = dilate(fine, disc(self.margin * ANTIALIAS))
        return reduce(fine * 255.0), reduce(wide * 255.0)

    def paddle(self, tail: tuple[int, int], degrees: float) -> tuple[_Window, _Window]:
        """One paddle, and its mask, in [0, 1]."""
        drawn, mask = self.window(degrees)
        return self._placed(drawn, tail), self._placed(mask, tail)

    def marker(self, center: tuple[int, int]) -> _Window:
        """A white disc, in [0, 1]."""
        radius = self.settings.marker
        half = math.ceil(radius) + 1
        fine = np.arange(2 * half * ANTIALIAS + 1) - half * ANTIALIAS
        wide = fine[:, None] ** 2 + fine**2 <= (radius * ANTIALIAS) ** 2
        return self._placed(reduce(wide * 255.0), center)

    def _placed(self, window: np.ndarray, center: tuple[int, int]) -> _Window:
        side, half = self.settings.side, window.shape[0] // 2
        inside = [(max(0, part - half), min(side, part + half + 1)) for part in center]
        cut = tuple(
            slice(low - part + half, high - part + half) for part, (low, high) in zip(center, inside, strict=True)
        )
        return _Window(window[cut] / 255, (slice(*inside[0]), slice(*inside[1])))

    def circle(self, pivot: tuple[float, float]) -> np.ndarray:
        """(pixels, 2): the different pixels of the circle about ``pivot`` that lie inside, in a fixed order."""
        reach = self.settings.paddle + self.margin
        pixels = np.ceil(np.round(pivot + reach * _CIRCLE, 9)).astype(np.int64)
        pixels = pixels[((pixels >= 0) & (pixels < self.settings.side)).all(1)]
        first = np.unique(pixels[:, 0] * self.settings.side + pixels[:, 1], return_index=True)[1]
        return pixels[first]

    def highest_near(self, occupied: np.ndarray, pixels: np.ndarray) -> np.ndarray:
        """(pixels,) the largest of ``occupied`` within ``margin`` of each."""
        near = pixels[:, None] + disc(self.margin)
        inside = ((near >= 0) & (near < self.settings.side)).all(-1)
        near = near.clip(0, self.settings.side - 1)
        return np.where(inside, occupied[near[..., 0], near[..., 1]], 0.0).max(1)

    def frame(self, width: int) -> np.ndarray:
        """1 on a frame ``width`` pixels wide, 0 inside."""
        picture = np.ones((self.settings.side, self.settings.side))
        picture[width:-width, width:-width] = 0
        return picture

    def free_tail(self, occupied: np.ndarray, degrees: float) -> tuple[int, int]:
        """A uniform pixel on which a paddle's saturated mask covers nothing.

        The original asks an image library for a dilation whose border value makes the attempt fail
        wherever the kernel could lie wholly outside the picture; so does this one, since that decides how
        many distractors there are.
        """
        reach = self.settings.paddle + self.margin
        _, mask = self.window(degrees)
        saturated = np.argwhere(mask >= 255) - self.radius + 1  # the kernel's line starts one pixel off its middle
        offsets = saturated[(np.abs(saturated) <= reach).all(1)]
        if not len(offsets) or self._leaves(offsets):
            raise _Failed
        free = np.pad(occupied == 0, reach, constant_values=True)
        side = self.settings.side
        fits = np.ones((side, side), dtype=bool)
        for y, x in offsets:
            fits &= free[reach + y : reach + y + side, reach + x : reach + x + side]
        tails = np.argwhere(fits)
        if not len(tails):
            raise _Failed
        y, x = tails[self.draws.below(len(tails))]
        return int(y), int(x)

    @staticmethod
    def _leaves(offsets: np.ndarray) -> bool:
        """Whether a kernel at one of the picture's corners lies wholly outside: the corners are the worst pixels."""
        y, x = offsets[:, 0], offsets[:, 1]
        return any(bool(((v * y < 0) | (h * x < 0)).all()) for v in (1, -1) for h in (1, -1))


def generate(settings: Settings, draws: Draws) -> Picture:
    """One picture."""
    canvas = _Canvas(settings, draws)
    while True:
        try:
            first, second, occupied = _targets(canvas)
            break
        except _Failed:
            continue
    picture = np.zeros_like(occupied)
    for window in (*first.drawn, *second.drawn):
        window.paste(picture, settings.contrast)
    second.mask.paste(occupied)
    drawn = 0
    for _ in range(settings.distractors):
        if (occupied == 0).mean() < FREE_SHARE:
            break
        for _ in range(DISTRACTOR_TRIES):
            try:
                snake, occupied = _distractor(canvas, occupied)
            except _Failed:
                continue
            for window in snake.drawn:
                window.paste(picture, settings.distractor_contrast)
            drawn += 1
            break
    label, origin = draws.below(2), draws.below(2)
    snakes = (first, second)
    ends = (snakes[origin].tips[0], snakes[origin if label else 1 - origin].tips[-1])
    for center in ends:
        canvas.marker(center).paste(picture)
    low, high = picture.min(), picture.max()
    pixels = np.floor((picture - low) * (255 / (high - low)) + 0.5).astype(np.uint8)
    return Picture(pixels, label, (first.tips, second.tips), drawn)


def _targets(canvas: _Canvas) -> tuple[_Snake, _Snake, np.ndarray]:
    settings, draws = canvas.settings, canvas.draws
    occupied = canvas.frame(BORDER)
    framed = np.maximum(occupied, canvas.frame(2 * settings.seed_distance))
    first = _seed(canvas, lambda degrees: canvas.free_tail(framed, degrees))
    start = first.tips[0]
    second = _seed(canvas, lambda degrees: canvas.at(start, draws.below(360), settings.seed_distance))
    for _ in range(settings.paddles - 1):
        occupied = first.extend(canvas, occupied)
        occupied = second.extend(canvas, occupied)
    return first, second, occupied


def _seed(canvas: _Canvas, tail: Callable[[int], tuple[int, int]]) -> _Snake:
    """A path's first paddle, at an angle drawn first; drawn again where it leaves the picture."""
    for _ in range(SEED_TRIES):
        degrees = canvas.draws.below(360)
        start = tail(degrees)
        if canvas.inside(start) and canvas.inside(canvas.at(start, degrees, canvas.settings.paddle)):
            return _Snake(canvas, start, degrees)
    raise _Failed


def _distractor(canvas: _Canvas, occupied: np.ndarray) -> tuple[_Snake, np.ndarray]:
    framed = np.maximum(occupied, canvas.frame(1))
    snake = _seed(canvas, lambda degrees: canvas.free_tail(framed, degrees))
    for _ in range(canvas.settings.paddles // 3 - 1):
        occupied = snake.extend(canvas, occupied)
    snake.mask.paste(occupied)
    return snake, occupied
