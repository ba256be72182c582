"""What the co-scheduler works with: replay buffer, teacher rows, counters, time share, publication."""
