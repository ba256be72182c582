"""Learning in a process of its own, for one server or several: rows go there, versions come back."""
