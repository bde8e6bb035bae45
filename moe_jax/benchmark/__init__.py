"""Benchmarks: the time of each part, compared with bounds and peers measured in the same run."""
