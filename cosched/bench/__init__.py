"""Benchmarks: suites of runs, their results as JSON, and the figures of the pages made from them."""
