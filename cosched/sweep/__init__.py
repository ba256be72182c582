"""A grid of experiments on recorded text: planned, run by worker processes, and compared."""
