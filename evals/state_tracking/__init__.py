"""Which layers track a state over lengths they were not trained on: parity and arithmetic modulo 5.

``python -m evals.state_tracking --suite cpu --out DIR`` (parity, minutes on 2 cores) or ``--suite paper``
(the full protocol, one GPU), then ``--report DIR``. Every arm gets the same grid and the same number of
runs; the checkpoint of a run and the grid point of an arm are chosen by validation at the longest trained
length; tests are longer than anything trained on. Protocols are ``configs/state_tracking/*.yaml``.
"""
