"""Set disjointness: what the order of two lists costs a model that reads once, and one that reads a prefix twice."""
