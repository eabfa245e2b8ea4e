"""The commands of ``seqmodels``, one module each, found by name: see :mod:`seqmodels.cli`."""
