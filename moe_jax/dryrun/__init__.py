"""Compiles a run's train step for devices that this machine lacks, and analyses the program."""
