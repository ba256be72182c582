"""What may be served: the guard, what it remembers, its statistics, and how drafts are scored.

Read ``statistics`` for what is claimed and how surely, ``monitor`` for what follows from it.
"""
