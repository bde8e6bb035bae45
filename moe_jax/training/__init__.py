"""Losses, optimizer, the pure step, and the loop around it."""
