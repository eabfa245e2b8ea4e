"""Are a feature map's weights spiky and monotone like the softmax they stand in for, before and after distillation?

``python -m evals.feature_maps --out DIR`` (CPU, about two minutes): mean entropy of the weights beside ln n and
the softmax, rank correlation with q . k, and KL from the softmax, for every map of the library, three seeds; the
diagnostic of the Hedgehog paper (arXiv:2402.04347, section 4.1). Exit status 1 when the order of the maps is not the
known one. ``--report DIR ...`` draws the page from the rows alone.
"""
