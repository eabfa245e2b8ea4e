"""Needle in a haystack, RULER's single-needle tasks S-NIAH 1 to 3 (arXiv:2404.06654)."""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from seqmodels.configuration import nearest
from seqmodels.tasks.corpus import open_corpus
from seqmodels.tasks.recall.examples import below, check_count
from seqmodels.tasks.shuffle import raw_draws

# RULER's strings (Apache-2.0): what makes numbers comparable.
PROMPT = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. I will quiz you about the "
    "{kind} afterwards.\n{context}\nWhat is the special magic {kind} for {key} mentioned in the provided text? "
    "The special magic {kind} for {key} mentioned in the provided text is"
)
NEEDLE = "One of the special magic {kind}s for {key} is: {value}."
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
DEPTHS = 40  # places in an essay, evenly from its beginning to its end
GENERATED = 128  # tokens of the answer, counted inside the length


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ADJECTIVES = _words(
    """
    amber ancient bitter bold brave bright calm clever cold curious dark deep distant eager early fair famous
    fierce gentle golden happy hidden hollow honest humble icy jolly keen kind late lazy lively lonely loud
    lucky mellow mighty misty modern narrow noble odd pale patient plain polite proud quick quiet rapid rare
    rough rusty salty secret sharp shy silent silver simple sleepy slow small smooth soft solid steady strange
    sunny sweet swift tall tidy tiny tough vast warm wild wise young
    """
)
NOUNS = _words(
    """
    anchor apple arrow basket beacon bell bird boat book bottle branch bridge bucket candle canyon castle chair
    cliff clock cloud coin comet crystal desert door drum engine falcon feather field flame forest fountain
    garden gate glacier hammer harbor hill island jacket kettle key ladder lake lantern leaf letter lion map
    marble meadow mirror moon mountain needle ocean orchard owl paper path pencil piano pillow planet pocket
    rabbit river road rocket saddle shadow ship spoon star stone storm table temple thunder tiger tower train
    tree tunnel valley violin wagon wheel window wolf
    """
)


class Variant(NamedTuple):
    """What the haystack and the value are."""

    essay: bool
    kind: str


VARIANTS = {
    "niah_single_1": Variant(essay=False, kind="number"),
    "niah_single_2": Variant(essay=True, kind="number"),
    "niah_single_3": Variant(essay=True, kind="uuid"),
}


class Haystack(NamedTuple):
    """A prompt with its needle.

    Attributes:
        prompt: the text that the model reads.
        answer: the value, which the generation must contain.
        tokens: of the prompt.
        depth: of the needle, 0 at the beginning of the context, 1 at its end.
    """

    prompt: str
    answer: str
    tokens: int
    depth: float


def needle(
    name: str,
    count: int,
    length: int,
    count_tokens: Callable[[str], int],
    *,
    text: str | None = None,
    depths: Sequence[float] | None = None,
    generated: int = GENERATED,
    seed: int = 42,
) -> list[Haystack]:
    """``count`` prompts of task ``name`` that fill ``length`` tokens, the answer's included.

    S-NIAH 1 repeats a few short sentences and hides a 7-digit number in a line of its own at a uniform
    place; 2 hides it in an essay, at the sentence end nearest to one of 40 even depths; 3 hides a UUID there.
    The haystack is the largest that leaves the prompt within ``length - generated`` tokens.

    Args:
        count_tokens: tokens of a text, such as ``lambda text: len(tokenizer.encode(text))``.
        text: of the essays, repeated when too short; :func:`local_text` when absent. RULER takes Paul Graham's
            essays: other text, other numbers.
        depths: instead of the 40 (for a heat map), for noise too: number i of the count takes
            ``depths[i % len(depths)]``.

    Raises:
        ValueError: an unknown task (with the nearest names), a length that the prompt without haystack exceeds,
            a text without a sentence, a depth outside [0, 1].
    """
    if name not in VARIANTS:
        raise ValueError(f"unknown task {name!r}.{nearest(name, VARIANTS)} Known: {', '.join(VARIANTS)}")
    check_count(name, count)
    if depths is not None and (not depths or not all(0 <= depth <= 1 for depth in depths)):
        raise ValueError(f"{name}: depths are {depths}; expected numbers from 0 to 1")
    variant = VARIANTS[name]
    source = _haystack(variant, text)
    draws = raw_draws(seed, list(VARIANTS).index(name), count=count * 5).reshape(count, 5)
    found = []
    room = length - generated
    size = 1
    for index, row in enumerate(draws):
        adjective, noun = ADJECTIVES[_one(row[0], len(ADJECTIVES))], NOUNS[_one(row[1], len(NOUNS))]
        key, value = f"{adjective}-{noun}", _value(variant.kind, row[2:4])
        depth = depths[index % len(depths)] if depths is not None else source.depth(row[4])
        said = NEEDLE.format(kind=variant.kind, key=key, value=value)

        def prompt(sentences: int, key: str = key, said: str = said, depth: float = depth) -> str:
            return PROMPT.format(kind=variant.kind, key=key, context=source.context(sentences, said, depth))

        size = _largest(lambda sentences: count_tokens(prompt(sentences)) <= room, max(1, size))
        if size < 1:
            raise ValueError(
                f"{name}: {length} tokens are too few; the prompt with one sentence of haystack has "
                f"{count_tokens(prompt(1))} and the answer {generated}: expected a length of at least their sum, "
                "better twice as much"
            )
        text_of = prompt(size)
        found.append(Haystack(text_of, value, count_tokens(text_of), depth))
    return found


def prompt_tokens(name: str, count_tokens: Callable[[str], int], *, text: str | None = None) -> int:
    """Tokens of a prompt with one sentence of haystack, give or take those of its key and value."""
    variant = VARIANTS[name]
    key, value = f"{ADJECTIVES[0]}-{NOUNS[0]}", _value(variant.kind, np.zeros(2, np.uint64))
    said = NEEDLE.format(kind=variant.kind, key=key, value=value)
    context = _haystack(variant, text).context(1, said, 0.0)
    return count_tokens(PROMPT.format(kind=variant.kind, key=key, context=context))


def is_right(generation: str, answer: str) -> bool:
    """The value is in the generated text, whatever its case."""
    return answer.lower() in generation.lower()


def local_text(characters: int = 1 << 20) -> str:
    """Prose that every Python installation has: the documentation strings of its standard library's source."""
    parts, size = [], 0
    for document in open_corpus("stdlib"):
        for quoted in re.findall(r'"""(.+?)"""', document.content.decode("utf-8", "replace"), re.DOTALL):
            words = " ".join(quoted.split())
            if words.count(" ") > 20 and ". " in words:
                parts.append(words if words.endswith(".") else words + ".")
                size += len(words)
        if size >= characters:
            break
    return " ".join(parts)


class _Noise:
    """The noise sentences over and over, a line a copy."""

    def depth(self, draw: np.uint64) -> float:
        return _one(draw, 1 << 20) / (1 << 20)

    def context(self, sentences: int, needle: str, depth: float) -> str:
        lines = [NOISE] * sentences
        lines.insert(min(sentences, int(depth * (sentences + 1))), needle)
        return "\n".join(lines)


class _Essay:
    """A text in sentences; the needle goes between two of them."""

    def __init__(self, text: str) -> None:
        self.sentences = [part for part in re.split(r"(?<=[.!?])\s+", text.strip()) if part]
        if not self.sentences:
            raise ValueError("the haystack's text has no sentence")

    def depth(self, draw: np.uint64) -> float:
        return _one(draw, DEPTHS) / (DEPTHS - 1)

    def context(self, sentences: int, needle: str, depth: float) -> str:
        own = self.sentences
        chosen = [own[index % len(own)] for index in range(sentences)]
        chosen.insert(round(depth * sentences), needle)
        return " ".join(chosen)


def _haystack(variant: Variant, text: str | None) -> _Noise | _Essay:
    return _Essay(local_text() if text is None else text) if variant.essay else _Noise()


def _largest(fits: Callable[[int], bool], guess: int) -> int:
    """The largest n >= 0 with ``fits(n)``, which is true up to some n and false after it; 0 when none is.

    Steps away from ``guess`` double, then halve: near a good guess (the prompt before) few texts are tokenized.
    """
    step = 1
    if fits(guess):
        low = guess
        while fits(low + step):
            low, step = low + step, 2 * step
        high = low + step
    else:
        high = guess
        while high > step and not fits(high - step):
            high, step = high - step, 2 * step
        low = max(0, high - step)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _one(draw: np.uint64, bound: int) -> int:
    return int(below(np.asarray([draw]), bound)[0])


def _value(kind: str, draws: np.ndarray) -> str:
    if kind == "number":
        return str(1_000_000 + _one(draws[0], 9_000_000))
    high, low = int(draws[0]), int(draws[1])
    return str(uuid.UUID(int=(high << 64) | low, version=4))
