"""Distillation losses; see ``cosched.protocols.Loss``."""
