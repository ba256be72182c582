"""What operators see of a server that adapts, and what they can ask of it."""
