"""Kernels: each fast path has a slow, obvious reference with the same signature."""
