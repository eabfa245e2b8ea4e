"""How fast every op, layer and model is, beside what a user would run today, and how far from the floor.

``python -m evals.throughput --suite cpu --out DIR`` (``gpu`` on one H100 class card, ``--deadline``
seconds), then ``--report DIR``. The protocol is in :mod:`evals.throughput.timing`: correctness against
float64 first, in the same process and on the same kind of tensors; interleaved runs; medians; floors
from ceilings measured in the same run.
"""
