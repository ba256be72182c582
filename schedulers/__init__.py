"""When to update (policies), with what (objectives), and what is taken where a file does not say.

No torch here; see ``Policy`` and ``Objective`` in ``cosched.protocols``.
"""
