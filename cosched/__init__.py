"""Test-time speculation: a draft model that learns from its target while it serves."""
