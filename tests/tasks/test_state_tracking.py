"""Formal languages: every label recomputed by other means, statistics, checksums, metrics by hand."""

from __future__ import annotations

import ast
import hashlib

import numpy as np
import pytest

from seqmodels.tasks.state_tracking import NO_TARGET, TASKS, accuracy_by_length, generate, scaled_accuracy, task_named

ARITHMETIC = dict(zip(range(1, 10), "+-*=01234", strict=True))
BRACKETED = dict(zip(range(11), "01234+-*()=", strict=True))
NAMES = tuple(TASKS)


def texts(examples, symbols):
    rows = zip(examples.tokens.tolist(), examples.lengths.tolist(), strict=True)
    return ["".join(symbols[token] for token in row[:length]) for row, length in rows]


def answers(examples):
    """The single target of each row, which must stand at its last token."""
    rows, columns = np.nonzero(examples.targets != NO_TARGET)
    assert rows.tolist() == list(range(len(examples.tokens)))
    assert columns.tolist() == (examples.lengths - 1).tolist()
    return examples.targets[rows, columns]


def value(text):
    """By a recursive descent over Python's own grammar, modulo 5 only at the end."""

    def visit(node):
        match node:
            case ast.Constant(value=digit):
                return digit
            case ast.UnaryOp(op=ast.USub(), operand=inner):
                return -visit(inner)
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return visit(left) + visit(right)
            case ast.BinOp(left=left, op=ast.Sub(), right=right):
                return visit(left) - visit(right)
            case ast.BinOp(left=left, op=ast.Mult(), right=right):
                return visit(left) * visit(right)
        raise AssertionError(f"unexpected {ast.dump(node)}")

    assert text.endswith("=")
    return visit(ast.parse(text[:-1], mode="eval").body) % 5


@pytest.mark.parametrize("every_token", [False, True])
def test_parity_labels(every_token):
    examples = generate("parity", 400, 2, 41, seed=3, every_token=every_token)
    for tokens, targets, length in zip(examples.tokens, examples.targets, examples.lengths, strict=True):
        ones = 0
        for at, (token, target) in enumerate(zip(tokens, targets, strict=True)):
            if at >= length:
                assert (token, target) == (0, NO_TARGET)
                continue
            ones += token == 2
            if every_token or at == length - 1:
                assert target == (2 if ones % 2 else 1)
            else:
                assert target == NO_TARGET
    assert set(examples.lengths.tolist()) == set(range(1, 41))


def test_arithmetic_labels_and_form():
    examples = generate("modular_arithmetic", 600, 3, 60, seed=5)
    found = texts(examples, ARITHMETIC)
    assert [5 + value(text) for text in found] == answers(examples).tolist()
    for text in found:
        assert len(text) % 2 == 0
        assert all(symbol in "01234" for symbol in text[:-1:2])
        assert all(symbol in "+-*" for symbol in text[1:-1:2])
    assert {len(text) for text in found} == set(range(2, 60, 2))  # n - 1 tokens, n - 2 for an even n
    assert (examples.tokens[np.arange(59) >= examples.lengths[:, None]] == 0).all()


def test_bracket_labels_and_form():
    examples = generate("modular_arithmetic_brackets", 600, 3, 60, seed=5)
    found = texts(examples, BRACKETED)
    assert [value(text) for text in found] == answers(examples).tolist()
    assert {len(text) for text in found} == set(range(3, 59))  # n - 2 tokens, n at least 5
    assert (examples.tokens[np.arange(58) >= examples.lengths[:, None]] == 11).all()
    assert not any("*" in text for text in found)
    assert all(_in_grammar(text[:-1]) for text in found)


def _in_grammar(text):
    """Exactly d, -d, (d), (-d) and, from five symbols on, (L op R)."""
    shape = "".join("d" if symbol in "01234" else symbol for symbol in text)
    if len(shape) < 5:
        return shape == ("d", "-d", "(d)", "(-d)")[len(shape) - 1]
    if shape[0] != "(" or shape[-1] != ")":
        return False
    return any(
        text[at] in "+-" and _in_grammar(text[1:at]) and _in_grammar(text[at + 1 : -1])
        for at in range(2, len(text) - 2)
        if text[1:at].count("(") == text[1:at].count(")")
    )


def test_grammar_checker_refuses_what_is_not_in_the_language():
    assert _in_grammar("((-1)+2)")
    assert not _in_grammar("1+2")
    assert not _in_grammar("(1)+(2)")
    assert not _in_grammar("(1*2)")


@pytest.mark.parametrize("name", NAMES)
def test_lengths_are_uniform(name):
    """Chi-square over the 30 lengths of [11, 40]; the bound is its 99.9 % quantile for 29 degrees."""
    count = 6000
    examples = generate(name, count, 11, 40, seed=8)
    seen = np.unique(examples.lengths, return_counts=True)[1]
    expected = count / len(seen)
    assert len(seen) == (15 if name == "modular_arithmetic" else 30)
    assert ((seen - expected) ** 2 / expected).sum() < 58.3


@pytest.mark.parametrize("name", NAMES)
def test_symbols_and_answers_are_uniform(name):
    task = task_named(name)
    examples = generate(name, 5000, 40, 40, seed=9)
    equally_likely = {
        "parity": [[1, 2]],
        "modular_arithmetic": [[5, 6, 7, 8, 9], [1, 2, 3]],
        "modular_arithmetic_brackets": [[0, 1, 2, 3, 4]],
    }
    for ids in equally_likely[name]:
        counts = np.array([(examples.tokens == symbol).sum() for symbol in ids])
        assert np.abs(counts / counts.mean() - 1).max() < 0.03
    found = answers(examples) - task.first_answer
    assert found.min() == 0
    assert found.max() == task.num_answers - 1
    if name != "modular_arithmetic":  # products make 0 more likely there
        shares = np.bincount(found) / len(found)
        assert np.abs(shares - task.chance).max() < 5 * np.sqrt(task.chance / len(found))


def test_splits_of_bracketed_expressions_are_uniform():
    """|L| of the outermost operator is uniform in 1 to len - 4; chi-square as above, 32 degrees."""
    examples = generate("modular_arithmetic_brackets", 6600, 40, 40, seed=2)
    sizes = np.zeros(34, dtype=int)
    minus = 0
    for text in texts(examples, BRACKETED):
        depth = 0
        for at in range(1, len(text) - 2):
            depth += (text[at] == "(") - (text[at] == ")")
            if depth == 0 and text[at] in "+-" and at >= 2:
                sizes[at - 1] += 1
                minus += text[at] == "-"
                break
    assert sizes.sum() == 6600
    assert ((sizes[1:] - 200) ** 2 / 200).sum() < 62.5
    assert abs(minus / 6600 - 0.5) < 0.02


@pytest.mark.parametrize("name", NAMES)
def test_seeds_streams_and_counts(name):
    few, many = (generate(name, count, 3, 30, seed=1, stream=(7,)) for count in (5, 9))
    for short, long in zip(few, many, strict=True):
        np.testing.assert_array_equal(short, long[:5])
    for other in (generate(name, 5, 3, 30, seed=2, stream=(7,)), generate(name, 5, 3, 30, seed=1, stream=(8,))):
        assert not np.array_equal(few.tokens, other.tokens)


CHECKSUMS = {
    "parity": "fa70b98cb45bfaaf",
    "modular_arithmetic": "8b2be8e72a929b07",
    "modular_arithmetic_brackets": "7ae6498a99b84e88",
}


@pytest.mark.parametrize("name", NAMES)
def test_one_seed_is_one_data_set_for_ever(name):
    examples = generate(name, 64, 3, 40, seed=0, stream=(1, 2))
    assert all(array.dtype == np.int64 for array in examples)
    digest = hashlib.sha256(b"".join(array.astype("<i8").tobytes() for array in examples)).hexdigest()[:16]
    assert digest == CHECKSUMS[name]


@pytest.mark.parametrize("name", NAMES)
def test_shortest_lengths(name):
    task = task_named(name)
    shortest = {"parity": 2, "modular_arithmetic": 3, "modular_arithmetic_brackets": 5}[name]
    examples = generate(name, 20, task.min_length, shortest, seed=0)
    tokens = {"parity": 1, "modular_arithmetic": 2, "modular_arithmetic_brackets": 3}[name]
    assert examples.lengths.tolist() == [tokens] * 20
    answers(examples)


def test_bad_input():
    with pytest.raises(ValueError, match=r"unknown task 'parrity'.*parity"):
        generate("parrity", 1, 3, 4, seed=0)
    with pytest.raises(ValueError, match="min_length is 1; expected at least 2"):
        generate("parity", 1, 1, 4, seed=0)
    with pytest.raises(ValueError, match="min_length is 2; expected at least 3"):
        generate("modular_arithmetic", 1, 2, 4, seed=0)
    with pytest.raises(ValueError, match="max_length is 4; expected at least 5"):
        generate("modular_arithmetic_brackets", 1, 3, 4, seed=0)
    with pytest.raises(ValueError, match="max_length is 4; expected at least min_length=5"):
        generate("parity", 1, 5, 4, seed=0)
    with pytest.raises(ValueError, match="count is 0"):
        generate("parity", 0, 5, 5, seed=0)
    with pytest.raises(ValueError, match="one at the end only"):
        generate("modular_arithmetic", 1, 5, 5, seed=0, every_token=True)


def test_scaled_accuracy_by_hand():
    assert scaled_accuracy(1.0, 0.5) == 1
    assert scaled_accuracy(0.5, 0.5) == 0
    assert scaled_accuracy(0.25, 0.5) == -0.5
    assert scaled_accuracy(0.6, 0.2) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="accuracy is 98"):
        scaled_accuracy(98, 0.5)


def test_accuracy_by_length_by_hand():
    examples = generate("parity", 3, 4, 4, seed=0, every_token=True)
    wrong = examples.targets.copy()
    wrong[1, 2] = 3 - wrong[1, 2]
    assert accuracy_by_length("parity", wrong, examples) == {2: (3, 3), 3: (3, 3), 4: (2, 3)}
    for name, n in (("parity", 4), ("modular_arithmetic", 7), ("modular_arithmetic_brackets", 9)):
        last = generate(name, 3, n, n, seed=0)
        assert accuracy_by_length(name, last.targets, last) == {n: (3, 3)}
        assert accuracy_by_length(name, np.full_like(last.targets, -1), last) == {n: (0, 3)}
    with pytest.raises(ValueError, match="expected the targets' shape"):
        accuracy_by_length("parity", wrong[:2], examples)
