"""Recall tasks: generators by name (:mod:`seqmodels.tasks.recall.registry`), and how answers are scored."""
