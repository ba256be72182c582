"""What the walk of a round works with: buffer, teacher rows, counters, meter, budget, publication."""
