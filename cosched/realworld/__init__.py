"""The real world: a public chat model, drafts and prompts of our own; for claims, not for tests."""
