"""Policies that pick the cadence of updates; see ``cosched.protocols.Policy``. No torch here."""
