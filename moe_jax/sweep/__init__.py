"""Sweeps: lists of runs in a file, executed as processes, with results by run and by group."""
