"""What the walk of a round is made of: counters, the time each step takes, and the budget of updates."""
