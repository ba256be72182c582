"""Experiment trackers: what ``run.trackers`` names is drawn while it goes on."""
