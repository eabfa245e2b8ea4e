"""What the PTD solver minimises, and what it accepts."""

from __future__ import annotations

from typing import NamedTuple


class Settings(NamedTuple):
    """Settings of one solution; results are stored under them.

    Attributes:
        weight: beta in log kappa(V) + beta ||E||_F / ||A||_F.
        initial_size: E starts uniform in (-initial_size * N, 0].
        learning_rate: of Adam, times N; decays to a hundredth of it.
        steps: gradient steps of each start.
        starts: random starts; the best accepted one is kept.
        target_error: largest sup |G - G_LegS| (C = e_0) that is accepted.
        seed: of the first start; start k uses seed + k.
    """

    weight: float = 100.0
    initial_size: float = 0.03
    learning_rate: float = 0.003
    steps: int = 1000
    starts: int = 4
    target_error: float = 0.2
    seed: int = 0


def default_settings(size: int) -> Settings:
    """Small systems afford a larger E; large ones need smaller steps, or they end at unstable spectra."""
    if size < 16:
        return Settings(weight=25.0, steps=3000)
    if size <= 64:
        return Settings()
    return Settings(weight=200.0, initial_size=0.015, learning_rate=0.00075, steps=2000)


def check_settings(settings: Settings) -> None:
    """Refuses settings out of range by name."""
    for name in ("weight", "target_error", "initial_size", "learning_rate"):
        if not getattr(settings, name) > 0:
            raise ValueError(f"Settings: {name} is {getattr(settings, name)!r}; expected a positive number")
    for name in ("steps", "starts"):
        value = getattr(settings, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"Settings: {name} is {value!r}; expected a positive integer")
