"""A YAML file and its overrides, merged, typed, and checked as a whole."""
