"""Phone books and needles: what a prompt says is what the answer is; sizes, places, scores, refusals."""

from __future__ import annotations

import hashlib
import json
import math
import re
import uuid
from collections import Counter

import pytest

from seqmodels.tasks.recall import needle as needle_module
from seqmodels.tasks.recall import phonebook as phonebook_module
from seqmodels.tasks.recall.needle import NOISE, VARIANTS, local_text, needle
from seqmodels.tasks.recall.phonebook import FIRST_NAMES, LAST_NAMES, phonebook

TEXT = "First one here. A second, longer sentence follows it! Does a third? Yes. " * 3


def checksum(found) -> str:
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()[:16]


def near(count: int, total: int, p: float, sigmas: float = 5) -> bool:
    return abs(count - total * p) <= sigmas * math.sqrt(total * p * (1 - p)) + 1


def words(text: str) -> int:
    return len(text.split())


# Phone book


def test_phonebook_answers_are_in_the_book():
    for prompt, answer in phonebook(40, entries=7, seed=1):
        book_text, examples, question = prompt.split("\n\n")
        book = dict(line.split(": ") for line in book_text.split("\n"))
        assert len(book) == 7
        assert all(re.fullmatch(r"[6-9]\d{9}", number) for number in book.values())
        shown = dict(line.split(": ") for line in examples.split("\n"))
        assert len(shown) == 2
        assert shown.items() <= book.items()
        assert question.endswith(":")
        assert question[:-1] not in shown
        assert book[question[:-1]] == answer


def test_phonebook_is_one_data_set():
    found = phonebook(5, entries=5, seed=3, stream=(1,))
    assert checksum(found) == "325d182b4199381a"
    assert phonebook(9, entries=5, seed=3, stream=(1,))[:5] == found
    assert phonebook(5, entries=5, seed=4, stream=(1,)) != found
    assert len(set(FIRST_NAMES)) == len(FIRST_NAMES)
    assert len(set(LAST_NAMES)) == len(LAST_NAMES)


def test_phonebook_score_is_the_first_line():
    right = phonebook_module.is_right
    assert right(" 7012345678 \nAnna Berg: 6", "7012345678")
    assert not right("7012345678 and more", "7012345678")
    assert not right("\n7012345678", "7012345678")
    assert not right("", "7012345678")


def test_phonebook_refusals():
    with pytest.raises(ValueError, match="2 entries; expected 3 to"):
        phonebook(1, entries=2, seed=0)
    with pytest.raises(ValueError, match="entries; expected 3 to"):
        phonebook(1, entries=len(FIRST_NAMES) * len(LAST_NAMES) + 1, seed=0)
    with pytest.raises(ValueError, match="count is 0"):
        phonebook(0, seed=0)


# Needle


@pytest.mark.parametrize("name", VARIANTS)
def test_needles_fill_the_length_and_say_the_answer_once(name):
    found = needle(name, 30, 300, words, text=TEXT, generated=20, seed=1)
    depths = set()
    for prompt, answer, tokens, depth in found:
        assert tokens == words(prompt) <= 280
        # One more sentence, of at most 19 words, would not fit.
        assert tokens > 280 - 19
        assert prompt.count(answer) == 1
        before, context, question = prompt.split("\n", 1)[0], *prompt.split("\n", 1)[1].rsplit("\n", 1)
        kind = VARIANTS[name].kind
        said = re.search(rf"One of the special magic {kind}s for (\w+-\w+) is: {answer}\.", context)
        assert said is not None
        assert question.endswith(f"The special magic {kind} for {said[1]} mentioned in the provided text is")
        assert kind in before
        depths.add(depth)
        # Nothing but the haystack is before and after the needle.
        rest = context.replace(said[0], "")
        assert set(re.findall(r"\w+", rest)) <= set(re.findall(r"\w+", TEXT if VARIANTS[name].essay else NOISE))
        place = len(context[: said.start()].split()) / (words(context) - words(said[0]))
        assert abs(place - depth) < 0.15  # sentences of up to 19 of about 230 words
        if kind == "uuid":
            assert uuid.UUID(answer).version == 4
        else:
            assert re.fullmatch(r"[1-9]\d{6}", answer)
    if VARIANTS[name].essay:
        assert all(round(depth * 39) == pytest.approx(depth * 39) for depth in depths)
    assert len(depths) > 10


def test_needles_are_one_data_set():
    found = [needle(name, 4, 200, words, text=TEXT, generated=20, seed=3) for name in VARIANTS]
    assert checksum(found) == "53c680b31c1921db"
    assert needle("niah_single_2", 9, 200, words, text=TEXT, generated=20, seed=3)[:4] == found[1]


def test_the_haystack_is_the_largest_that_fits():
    for limit in range(40):
        for guess in range(1, 45):
            calls = []

            def fits(size, limit=limit, calls=calls):
                calls.append(size)
                return size <= limit

            assert needle_module._largest(fits, guess) == limit
            assert min(calls) >= 0
    # A step or two from the prompt before costs a few looks, not the logarithm of the size.
    for limit in (998, 999, 1000, 1001, 1002):
        calls = []
        needle_module._largest(lambda size, limit=limit, calls=calls: calls.append(size) or size <= limit, 1000)
        assert len(calls) <= 5


@pytest.mark.parametrize("name", ["niah_single_1", "niah_single_2"])
def test_needles_stand_where_the_depth_says(name):
    text = " ".join(f"Sentence number {index} is here." for index in range(1000))
    depths = [index / 10 for index in range(11)]
    for found in needle(name, 22, 400, words, text=text, depths=depths, generated=20):
        context = found.prompt.split("\n", 1)[1].rsplit("\n", 1)[0]
        before, _, after = context.partition("One of the special magic")
        if name == "niah_single_1":
            above, below = before.count("The grass"), after.count("The grass")
            assert above == min(above + below, int(found.depth * (above + below + 1)))
        else:
            above, below = before.count("Sentence"), after.count("Sentence")
            assert above == round(found.depth * (above + below))
            assert re.findall(r"number (\d+)", before + after) == [str(index) for index in range(above + below)]


def test_needles_are_uniform():
    count = 1200
    noise = needle("niah_single_1", count, 150, words, generated=20, seed=5)
    essay = needle("niah_single_2", count, 150, words, text=TEXT, generated=20, seed=5)
    for found, places in ((noise, 8), (essay, 40)):
        bins = Counter(round(one.depth * 39) if places == 40 else int(one.depth * places) for one in found)
        assert set(bins) == set(range(places))
        assert all(near(seen, count, 1 / places) for seen in bins.values())
        firsts = Counter(one.answer[0] for one in found)
        assert all(near(firsts[digit], count, 1 / 9) for digit in "123456789")
        keys = [re.search(r"for (\w+)-(\w+) is", one.prompt) for one in found]
        adjectives = Counter(key[1] for key in keys if key)
        assert set(adjectives) <= set(needle_module.ADJECTIVES)
        assert adjectives.total() == count
        # The largest of so many counts of about 15 each stays within 5 standard deviations of a binomial one.
        assert all(near(seen, count, 1 / len(needle_module.ADJECTIVES)) for seen in adjectives.values())


def test_phonebooks_are_uniform():
    found = phonebook(400, entries=3, seed=5)
    numbers = [line.split(": ")[1] for prompt, _ in found for line in prompt.split("\n\n")[0].split("\n")]
    total = len(numbers)
    firsts = Counter(number[0] for number in numbers)
    assert all(near(firsts[digit], total, 1 / 4) for digit in "6789")
    others = Counter("".join(number[1:] for number in numbers))
    assert all(near(others[digit], 9 * total, 1 / 10) for digit in "0123456789")
    asked = Counter(prompt.split("\n").index(f"{prompt.rsplit(chr(10), 1)[1]} {answer}") for prompt, answer in found)
    assert all(near(asked[place], 400, 1 / 3) for place in range(3))


def test_depths_may_be_given():
    found = needle("niah_single_1", 4, 300, words, depths=(0.0, 1.0), generated=20)
    assert [one.depth for one in found] == [0.0, 1.0, 0.0, 1.0]
    contexts = [one.prompt.split("\n") for one in found]
    assert all(lines[1].startswith("One of") for lines in contexts[::2])
    assert all(lines[-2].startswith("One of") for lines in contexts[1::2])


def test_needle_score_is_containment_whatever_the_case():
    right = needle_module.is_right
    assert right("It is ABC-1.", "abc-1")
    assert not right("", "abc-1")
    assert not right("abc", "abc-1")


def test_needle_refusals():
    with pytest.raises(ValueError, match=r"unknown task 'niah_single_4'.*Did you mean"):
        needle("niah_single_4", 1, 300, words)
    with pytest.raises(ValueError, match="100 tokens are too few; the prompt with one sentence of haystack has"):
        needle("niah_single_1", 1, 100, words, generated=60)
    with pytest.raises(ValueError, match="expected numbers from 0 to 1"):
        needle("niah_single_1", 1, 300, words, depths=(1.5,))
    with pytest.raises(ValueError, match="no sentence"):
        needle("niah_single_2", 1, 300, words, text="  ")


def test_local_text_is_prose():
    text = local_text(20_000)
    assert len(text) >= 20_000
    assert text.count(". ") > 50
