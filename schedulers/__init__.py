"""When to update (policies), with what (objectives), how much to draft (lengths), and the defaults.

No torch here; see ``Policy``, ``Objective`` and ``DraftLength`` in ``cosched.protocols``.
"""
