"""Micro-updates of the draft: the loss of a batch, and the DeepSpeed trainer that steps on it."""
