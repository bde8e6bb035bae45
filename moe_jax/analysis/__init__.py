"""Measures of routers and experts, and statistics of a parent."""
