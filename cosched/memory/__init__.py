"""What an experiment will take in memory, before it is run."""
