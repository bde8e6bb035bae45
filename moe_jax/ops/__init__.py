"""Kernels: a slow, obvious reference beside each fast path, one signature for both."""
