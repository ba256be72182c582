"""A small world of our own making: text, tokenizer, target and drafts, rebuilt by one command."""
