"""What Hydra's parts do, measured: our own versions of the measurements published with arXiv:2508.15099.

``python -m evals.hydra --suite cpu --out DIR`` runs them, ``--report DIR`` draws the page. Throughput is counted in
processor seconds of one thread with all models in turn, so that other work on the machine does not decide.
"""
