"""What runs inside SGLang's scheduler: the workers that are watched, and their adaptation."""
