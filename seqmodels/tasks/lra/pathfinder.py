"""Pathfinder (Linsley et al., arXiv 1805.08315) with Long Range Arena's settings, contour length 14.

Two dashed paths ("snakes") among shorter ones; a disc marks one end of the first or second, another disc the
other end of the same path (label 1) or of the other one (label 0). Each path grows paddle by paddle: a pivot
behind its head, a candidate pixel on a circle about the pivot, chosen with probability in proportion to
(1 - occupied) cos^2(min(c |turn|, pi / 2)). Pictures are stretched to 0..255.

Coordinates are (y, x); an angle's direction is (sin, cos). Pivots are whole pixels, so a paddle is one of a few
dozen small pictures that :class:`_Brush` draws once; what is left for a picture is to place them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from seqmodels.tasks.lra.draws import Draws
from seqmodels.tasks.lra.raster import ANTIALIAS, dilate, direction, disc, line, reduce, round_up

BORDER = 1
CROWDED = 1.8  # two paddles' masks may touch, not cross
OCCUPIED = 0.3  # a faint rim of a mask does not occupy a pixel
NO_WAY = 1e-4  # least sum of the candidates' weights
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


class _Brush:
    """Everything about paddles of one size and margin that no picture changes."""

    def __init__(self, settings: Settings, margin: int) -> None:
        self.settings, self.margin = settings, margin
        self.reach = settings.paddle + margin  # of a pivot's circle
        self.half = settings.paddle + math.ceil(settings.thickness) + margin  # of a paddle's window
        self._drawn: dict[float, tuple[np.ndarray, np.ndarray]] = {}
        self._kernels: dict[int, np.ndarray | None] = {}
        # One sample for each pixel of the circle's length, each cut to the pixel it falls into.
        samples = [
            direction(index * 360 / (2 * math.pi * self.reach)) for index in range(math.ceil(2 * math.pi * self.reach))
        ]
        pixels = {tuple(math.floor(round(self.reach * part, 9)) for part in sample) for sample in samples}
        self.circle = np.array(sorted(pixels))  # (candidates, 2) from the pivot
        self.angles = np.arctan2(self.circle[:, 0], self.circle[:, 1])

    def paddle(self, degrees: float) -> tuple[np.ndarray, np.ndarray]:
        """A paddle from the middle of a window, and its mask, both in [0, 1]."""
        if degrees not in self._drawn:
            side, length = 2 * self.half * ANTIALIAS + 1, self.settings.paddle * ANTIALIAS
            y, x = direction(degrees)
            end = (round_up(length * y), round_up(length * x))
            fine = line(side, end, round(self.settings.thickness * ANTIALIAS))
            wide = dilate(fine, disc(self.margin * ANTIALIAS))
            self._drawn[degrees] = reduce(fine * 255.0) / 255, reduce(wide * 255.0) / 255
        return self._drawn[degrees]

    def kernel(self, degrees: int) -> np.ndarray | None:
        """(pixels, 2) offsets from a tail that must be free for a first paddle at this angle; None: it always fails.

        The original asks an image library for a dilation whose border value makes the attempt fail
        wherever the kernel could lie wholly outside the picture; so does this one, since that decides how
        many distractors there are.
        """
        if degrees not in self._kernels:
            _, mask = self.paddle(degrees)
            offsets = np.argwhere(mask >= 1) - self.half + 1  # the kernel's line starts one pixel off its middle
            offsets = offsets[(np.abs(offsets) <= self.reach).all(1)]
            self._kernels[degrees] = offsets if len(offsets) and not _leaves(offsets) else None
        return self._kernels[degrees]


def _leaves(offsets: np.ndarray) -> bool:
    """Whether a kernel at one of the picture's corners lies wholly outside: the corners are the worst pixels."""
    y, x = offsets[:, 0], offsets[:, 1]
    return any(bool(((v * y < 0) | (h * x < 0)).all()) for v in (1, -1) for h in (1, -1))


@functools.cache
def _brush(settings: Settings, margin: int) -> _Brush:
    return _Brush(settings, margin)


class _Snake:
    """One growing path: its paddles, the last one's mask, its tips, where it turns next."""

    def __init__(self, canvas: _Canvas, tail: tuple[int, int], pivot: tuple[int, int], degrees: int) -> None:
        picture, self.mask = canvas.paddle(tail, degrees)
        self.drawn = [picture]
        self.angle = math.radians(degrees)
        self.pivot = pivot
        self.tips = [tail]  # the first pixel, then the far end of every paddle

    def extend(self, canvas: _Canvas, occupied: np.ndarray) -> np.ndarray:
        """One paddle more; the occupied pixels with the paddle before it."""
        settings, brush = canvas.settings, canvas.brush
        pivot = _at(self.pivot, math.degrees(self.angle), settings.paddle + 2 * canvas.brush.margin)
        pixels = brush.circle + pivot
        inside = ((pixels >= 0) & (pixels < settings.side)).all(1)
        pixels, angles = pixels[inside], brush.angles[inside]
        turns = np.abs((angles - self.angle + math.pi) % (2 * math.pi) - math.pi)
        smooth = np.cos(np.minimum(settings.continuity * turns, math.pi / 2)) ** 2
        weights = (1 - canvas.highest_near(occupied, pixels)) * np.where(smooth > 1e-12, smooth, 0.0)
        if weights.sum() < NO_WAY:
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
    """A picture's size and margin, its random numbers, and what is placed on it."""

    def __init__(self, settings: Settings, draws: Draws) -> None:
        self.settings, self.draws = settings, draws
        self.brush = _brush(settings, settings.margins[draws.below(len(settings.margins))])

    def inside(self, pixel: tuple[int, int]) -> bool:
        return all(0 <= part < self.settings.side for part in pixel)

    def paddle(self, tail: tuple[int, int], degrees: float) -> tuple[_Window, _Window]:
        """One paddle, and its mask."""
        side, half = self.settings.side, self.brush.half
        inside = [(max(0, part - half), min(side, part + half + 1)) for part in tail]
        place = (slice(*inside[0]), slice(*inside[1]))
        cut = tuple(
            slice(low - part + half, high - part + half) for part, (low, high) in zip(tail, inside, strict=True)
        )
        drawn, mask = self.brush.paddle(degrees)
        return _Window(drawn[cut], place), _Window(mask[cut], place)

    def marker(self, center: tuple[int, int]) -> np.ndarray:
        """The whole picture with a white disc, in [0, 1]."""
        fine = np.arange(self.settings.side * ANTIALIAS)
        y, x = (fine - part * ANTIALIAS for part in center)
        wide = y[:, None] ** 2 + x**2 <= (self.settings.marker * ANTIALIAS) ** 2
        return reduce(wide * 255.0) / 255

    def highest_near(self, occupied: np.ndarray, pixels: np.ndarray) -> np.ndarray:
        """(pixels,) the largest of ``occupied`` within ``margin`` of each."""
        near = pixels[:, None] + disc(self.brush.margin)
        inside = ((near >= 0) & (near < self.settings.side)).all(-1)
        near = near.clip(0, self.settings.side - 1)
        return np.where(inside, occupied[near[..., 0], near[..., 1]], 0.0).max(1, initial=0.0)

    def frame(self, width: int) -> np.ndarray:
        """1 on a frame ``width`` pixels wide, 0 inside."""
        picture = np.ones((self.settings.side, self.settings.side))
        picture[width:-width, width:-width] = 0
        return picture

    def free_tail(self, occupied: np.ndarray, degrees: int) -> tuple[int, int]:
        """A uniform pixel on which a first paddle's kernel covers nothing that is occupied."""
        offsets = self.brush.kernel(degrees)
        if offsets is None:
            raise _Failed
        reach, side = self.brush.reach, self.settings.side
        free = np.ones((side + 2 * reach, side + 2 * reach), dtype=bool)
        free[reach:-reach, reach:-reach] = occupied <= OCCUPIED
        fits = np.ones((side, side), dtype=bool)
        for y, x in offsets:
            fits &= free[reach + y : reach + y + side, reach + x : reach + x + side]
        tails = np.flatnonzero(fits)
        if not len(tails):
            raise _Failed
        y, x = divmod(int(tails[self.draws.below(len(tails))]), side)
        return y, x


def _at(start: tuple[int, int], degrees: float, length: float) -> tuple[int, int]:
    """The pixel ``length`` from ``start``, both coordinates rounded up."""
    y, x = direction(degrees)
    return round_up(start[0] + length * y), round_up(start[1] + length * x)


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
        if (occupied <= OCCUPIED).mean() < FREE_SHARE:
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
        np.maximum(picture, canvas.marker(center), out=picture)
    low, high = picture.min(), picture.max()
    pixels = np.floor((picture - low) * (255 / (high - low)) + 0.5).astype(np.uint8)
    return Picture(pixels, label, (first.tips, second.tips), drawn)


def _targets(canvas: _Canvas) -> tuple[_Snake, _Snake, np.ndarray]:
    settings, draws = canvas.settings, canvas.draws
    occupied = canvas.frame(BORDER)
    framed = np.maximum(occupied, canvas.frame(2 * settings.seed_distance))
    first = _seed(canvas, lambda degrees: canvas.free_tail(framed, degrees))
    second = _seed(canvas, lambda degrees: _near(first.tips[0], draws.below(360), settings.seed_distance))
    for _ in range(settings.paddles - 1):
        occupied = first.extend(canvas, occupied)
        occupied = second.extend(canvas, occupied)
    return first, second, occupied


def _near(start: tuple[int, int], degrees: int, length: float) -> tuple[int, int]:
    """The pixel nearest to ``length`` from ``start``."""
    y, x = direction(degrees)
    return round(start[0] + length * y), round(start[1] + length * x)


def _seed(canvas: _Canvas, tail: Callable[[int], tuple[int, int]]) -> _Snake:
    """A path's first paddle, at an angle drawn first; drawn again where its head or pivot leaves the picture."""
    for _ in range(SEED_TRIES):
        degrees = canvas.draws.below(360)
        start = tail(degrees)
        head = _at(start, degrees, canvas.settings.paddle)
        pivot = _at(head, degrees + 180, canvas.brush.reach)
        if canvas.inside(head) and canvas.inside(pivot):
            return _Snake(canvas, start, pivot, degrees)
    raise _Failed


def _distractor(canvas: _Canvas, occupied: np.ndarray) -> tuple[_Snake, np.ndarray]:
    framed = np.maximum(occupied, canvas.frame(1))
    snake = _seed(canvas, lambda degrees: canvas.free_tail(framed, degrees))
    for _ in range(canvas.settings.paddles // 3 - 1):
        occupied = snake.extend(canvas, occupied)
    snake.mask.paste(occupied)
    return snake, occupied
