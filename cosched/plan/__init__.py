"""``cosched plan``: what learning would bring elsewhere, from what a run measured, by simulation."""
