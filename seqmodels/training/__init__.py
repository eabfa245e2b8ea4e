"""Training: one explicit loop on one process or under torchrun."""
