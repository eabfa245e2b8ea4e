from __future__ import annotations

import pytest

from seqmodels.models.pattern import parse_pattern


@pytest.mark.parametrize(
    ("pattern", "branches"),
    [
        ("attention", ["attention"]),
        ("a b", ["a", "b"]),
        ("3x(mamba3 swiglu) attention", ["mamba3", "swiglu"] * 3 + ["attention"]),
        ("2x(2x a b) c", ["a", "a", "b"] * 2 + ["c"]),
        ("2x(a 2x(b c)) ", ["a", "b", "c", "b", "c"] * 2),
        ("3xattention", ["attention"] * 3),
        (" ( a\n b ) ", ["a", "b"]),
    ],
)
def test_words_and_nested_repeats(pattern: str, branches: list[str]) -> None:
    assert parse_pattern(pattern) == [((word,),) for word in branches]


def test_a_branch_of_several_layers() -> None:
    expected = [(("s4d", "glu"),)] * 2 + [(("swiglu", "mlp", "mlp"),)]
    assert parse_pattern("2x s4d>glu swiglu > mlp > mlp") == expected


def test_parallel_paths_of_a_block() -> None:
    assert parse_pattern("2x(a|b>c d) e | f") == [(("a",), ("b", "c")), (("d",),)] * 2 + [(("e",), ("f",))]


@pytest.mark.parametrize(
    ("pattern", "column", "problem"),
    [
        ("2x(a b", 3, "never closed"),
        ("a b) c", 4, "closes nothing"),
        ("0x a", 1, "at least 1"),
        ("a 2x", 5, "followed by"),
        ("2x3x a", 3, "followed by"),
        ("2x 3x a", 3, "followed by"),
        ("a ()", 3, "nothing between"),
        ("a + b", 3, "unexpected '+'"),
        ("a 2 b", 3, "unexpected '2'"),
        ("> a", 1, "before it"),
        ("a >", 3, "after it"),
        ("a > (b)", 3, "after it"),
        ("| a", 1, "before it"),
        ("a|", 2, "after it"),
        ("a|2x b", 2, "after it"),
        ("2x | a", 3, "followed by"),
        ("3000000x a", 11, "more than"),
    ],
)
def test_errors_name_the_column(pattern: str, column: int, problem: str) -> None:
    with pytest.raises(ValueError, match=f"column {column}: .*{problem}".replace("+", r"\+")):
        parse_pattern(pattern)


def test_an_empty_pattern_is_refused() -> None:
    with pytest.raises(ValueError, match="names no layer"):
        parse_pattern("  ")
