"""Benchmarks: the time of each part beside bounds and peers measured in the same run."""
