"""``cosched top``: how a draft does, in a terminal."""
