"""What a run folder says: a table for the terminal and a page to learn from."""
