"""Which layer recalls what, at which state size and speed.

``python -m evals.recall --suite cpu --out DIR`` (under 40 minutes on 2 cores), ``--suite zoology``, ``based``,
``mad``, ... (GPU), then ``--report DIR``. A suite is a file of ``configs/recall``: tasks, arms, widths, learning
rates, seeds. Layers' arguments and learning rates are in ``configs/recall/layers.yaml``.
"""
