"""Set disjointness: two lists, and the one element that both have (JRT, arXiv:2407.05483, sections 3.2 and 5).

One seed gives one data set on every platform (:mod:`seqmodels.tasks.recall.examples`).
"""

from __future__ import annotations

import numpy as np

from seqmodels.tasks.recall.examples import Examples, below, blocks, check_count, distinct

BEGIN, BETWEEN, ANSWER = 1, 2, 3  # ids; 0 is a mask token that these sequences do not have
FIRST_ELEMENT = 4


def set_disjointness(
    count: int,
    *,
    first: int,
    second: int,
    vocab_size: int = 2048,
    seed: int,
    stream: tuple[int, ...] = (),
) -> Examples:
    """Rows of two lists A and B that share exactly one element t:

    .. code-block:: text

        tokens  = [1] a_1 ... a_n [2] b_1 ... b_m [3]      t is the target at the last position, and the only one

    Elements are ids from 4 on. Those of A and B are distinct draws, of A from a random half of the
    vocabulary, of B from the other half; then a uniformly chosen element t of A is written over a
    uniformly chosen position of B. A model that reads once must hold A when B begins, so its state grows
    with |A|, however small B is; with the input read twice, or a prefix that is read in both directions,
    the smaller of both is enough.

    Args:
        count: rows.
        first, second: |A| and |B|, sizes of the lists in the order in which they stand.
        vocab_size: ids, the four special ones included.
        seed, stream: name the data set; different streams of a seed are independent.

    Raises:
        ValueError: no rows, an empty list, or a list larger than its half of the vocabulary.
    """
    owner = "set_disjointness"
    check_count(owner, count)
    half = vocab_size // 2
    for name, size, pool in (("first", first, half), ("second", second, half - FIRST_ELEMENT)):
        if not 1 <= size <= pool:
            raise ValueError(
                f"{owner}: {name} is {size}; expected 1 to {pool}, its half of vocab_size={vocab_size} "
                "(raise vocab_size for larger lists)"
            )
    examples = Examples.empty(count, first + second + 3)
    elements = first + second
    for rows, draws in blocks(seed, stream, count, elements + 2):
        # Distinct ids in random order are a random split in halves, then distinct ids of each half.
        ids = FIRST_ELEMENT + distinct(draws[:, :elements], vocab_size - FIRST_ELEMENT)
        row = np.arange(len(ids))
        answer = ids[row, below(draws[:, elements], first)]
        ids[row, first + below(draws[:, elements + 1], second)] = answer
        tokens = examples.tokens[rows]
        tokens[:, 0], tokens[:, first + 1], tokens[:, -1] = BEGIN, BETWEEN, ANSWER
        tokens[:, 1 : first + 1], tokens[:, first + 2 : -1] = ids[:, :first], ids[:, first:]
        examples.targets[rows, -1] = answer
    return examples
