"""Long Range Arena: train and test a configuration on a task, beside the published numbers.

``python -m evals.lra generate TASK`` makes ListOps and Pathfinder, ``python -m evals.lra TASK --config NAME
--out DIR`` trains (resumable, ``--minutes 9`` stops in time for a short session), ``--report DIR`` draws the page.
Settings are ``configs/lra/*.yaml``. The epoch is chosen by validation, except on Text, which has no such split
and is chosen by test, as in all published numbers.
"""
