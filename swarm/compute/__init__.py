"""torch code that nodes and clients share, and nothing else."""
