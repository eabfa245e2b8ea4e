"""Conversion end to end: a softmax teacher trained from scratch, its attention swapped, and how much is recovered.

``python -m evals.conversion --suite cpu --out DIR`` trains small Llama models of bytes on the Python standard
library's source, converts each with ``seqmodels convert hedgehog``'s own code, and exits 1 when a control fails or
less than 95 % of what swapping cost is recovered.
"""
