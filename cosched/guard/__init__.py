"""Whether a candidate may serve, and whether what serves may stay: scores, statistics, verdicts."""
