"""Checks of balance rules against published formulas, ours and those of a peer on this machine."""
