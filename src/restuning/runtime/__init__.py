"""What one running process has once: random state, its place among the processes of a run, the network."""
