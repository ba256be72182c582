"""SGLang itself, on the CPU: the support for it, and the tiny world's drafts in it."""
