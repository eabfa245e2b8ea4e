"""Scores of generated answers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def contains(generation: str, answers: Iterable[str]) -> bool:
    """Whether any answer occurs in the generation, whatever its case (the metric of Based and JRT).

    Letters are compared as ``str.lower`` writes them and every other character literally: ``$5.1*`` is found as
    it stands. The white space around an answer does not count. An empty generation holds no answer.

    Raises:
        ValueError: no answer, or an empty one, which every text would contain.
    """
    wanted = [answer.strip().lower() for answer in answers]
    if not wanted or not all(wanted):
        raise ValueError(f"answers are {wanted}; expected at least one, none of them empty")
    text = generation.lower()
    return any(answer in text for answer in wanted)


def cut_at(text: str, stop: Sequence[str]) -> str:
    """``text`` before the first of the stop strings; all of it where there is none."""
    found = [index for index in (text.find(string) for string in stop) if index >= 0]
    return text[: min(found)] if found else text
