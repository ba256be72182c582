"""From a configuration to running parts: the only room that names concrete classes of all."""
