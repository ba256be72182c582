"""Draft model families behind one interface; see ``cosched.protocols.Drafter``."""
