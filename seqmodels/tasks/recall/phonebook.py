"""Phone-book look-up (Jelassi et al., arXiv:2402.01032): a book of names and numbers, two examples, a question."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from seqmodels.tasks.recall.examples import below, blocks, check_count, distinct


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


FIRST_NAMES = _words(
    """
    Adam Agnes Alan Alice Amir Anna Arthur Aya Bella Ben Boris Carla Carlos Cecil Chen Clara Daniel Daria David
    Diana Edith Elena Emil Emma Erik Esther Eva Farid Felix Fiona Frank Freya George Gina Greta Hanna Hans Hugo
    Ida Igor Irene Isaac Ivan Jack Jana Javier Jonas Julia Kamal Karen Karl Kira Laura Leo Lena Lina Louis Lucia
    Marco Maria Martin Maya Mei Milan Mina Nadia Nils Nina Noah Nora Olga Omar Oscar Otto Paula Pavel Peter
    Petra Priya Quinn Rafael Ravi Rita Robert Rosa Ruth Sam Sara Simon Sofia Stefan Tara Theo Tina Tomas Uma
    Vera Victor Yuki Zoe
    """
)
LAST_NAMES = _words(
    """
    Abbott Adler Ahmed Baker Barnes Becker Berg Blake Bloom Brandt Brown Carter Castillo Chang Clark Cohen Cole
    Cruz Dahl Davis Diaz Dixon Duarte Eklund Ellis Engel Evans Farah Fischer Fleming Flores Ford Foster Fox
    Garcia Gibbs Gomez Grant Green Gupta Haas Hall Hansen Harper Hayes Hill Hoffman Holm Hunt Ito Jansen Jensen
    Jones Kaplan Keller Khan Kim Klein Koch Kovac Kumar Lang Larsen Lee Lopez Lund Maier Marsh Mason Meyer
    Miller Moore Moreno Murphy Nagy Nguyen Novak Olsen Ortiz Owens Park Patel Perez Porter Reed Reyes Rossi
    Russo Sato Schmidt Silva Singh Stone Suzuki Tanaka Torres Turner Vega Wagner Walker Weber White Young Zhang
    """
)
EXAMPLES = 2  # shown before the question
DIGITS = 10


class Question(NamedTuple):
    """A prompt and the number that should follow it."""

    prompt: str
    answer: str


def phonebook(count: int, *, entries: int = 20, seed: int, stream: tuple[int, ...] = ()) -> list[Question]:
    """``count`` phone books of ``entries`` lines, each with two example look-ups and a question.

    .. code-block:: text

        Anna Berg: 7012345678\\n ... \\n\\n Name1: number1\\n Name2: number2\\n\\n Name3:

    Names of a book are distinct, numbers have 10 digits of which the first is 6 to 9, and the three
    entries asked for are distinct. Names are from this module's lists.

    Raises:
        ValueError: fewer than 3 entries, or more than there are names.
    """
    check_count("phonebook", count)
    names = len(FIRST_NAMES) * len(LAST_NAMES)
    if not EXAMPLES < entries <= names:
        raise ValueError(f"phonebook: {entries} entries; expected {EXAMPLES + 1} to {names}")
    questions = []
    width = entries * (1 + DIGITS) + EXAMPLES + 1
    for _, draws in blocks(seed, stream, count, width):
        name_draws, digit_draws, asked_draws = np.split(draws, [entries, entries * (1 + DIGITS)], axis=1)
        chosen = distinct(name_draws, names)
        digits = below(digit_draws, 10).reshape(len(draws), entries, DIGITS)
        digits[..., 0] = 6 + below(digit_draws.reshape(digits.shape)[..., 0], 4)
        for book, numbers, asked in zip(chosen, digits, distinct(asked_draws, entries), strict=True):
            lines = [f"{_name(name)}: {''.join(map(str, number))}" for name, number in zip(book, numbers, strict=True)]
            shown = [lines[at] for at in asked]
            question, _, answer = shown.pop().partition(": ")
            questions.append(Question("\n".join(lines) + "\n\n" + "\n".join(shown) + f"\n\n{question}:", answer))
    return questions


def is_right(generation: str, answer: str) -> bool:
    """The generated text up to its first line end, without outer spaces, is the number.

    Generate greedily, at most 50 tokens.
    """
    return generation.partition("\n")[0].strip() == answer


def _name(number: int) -> str:
    first, last = divmod(int(number), len(LAST_NAMES))
    return f"{FIRST_NAMES[first]} {LAST_NAMES[last]}"
