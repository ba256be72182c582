"""Engines decode requests and report every round to the co-scheduler."""
