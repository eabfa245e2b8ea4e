"""What the analysis of S4D and S4-PTD says, computed again in float64 and held against the known values.

``python -m evals.long_range_theory --out DIR`` (CPU, about a minute): transfer functions and their spikes, weak
against strong convergence, condition number against size of the perturbation, sensitivity to one Fourier mode, and
the kernels that the library's own ops make. Exit status 1 when a value is not the known one.
``--report DIR ...`` draws the page from the rows alone.
"""
