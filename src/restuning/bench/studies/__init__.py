"""What is found beyond one accuracy: ablations, robustness, forgetting, ensembles, checks."""
