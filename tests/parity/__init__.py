"""Our drafters against independent implementations, in an environment of its own (make parity)."""
