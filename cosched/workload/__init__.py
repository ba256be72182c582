"""Prompts and documents, read from files and made into requests."""
