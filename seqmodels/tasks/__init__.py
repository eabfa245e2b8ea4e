"""Data generators, loaders and metrics. Nothing in here trains."""
