"""Suites that measure: recall, long range, state tracking, throughput, text. Run from the clone.

Each is ``python -m evals.<name> --suite ... --out DIR`` and appends to ``DIR/results.jsonl``
(:mod:`evals.results`); ``--report DIR`` draws the page from those rows alone.
"""
