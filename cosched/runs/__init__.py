"""An experiment from its first request to its summary, and on from where it was interrupted."""
