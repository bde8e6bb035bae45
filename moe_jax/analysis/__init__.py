"""Numbers about routers and experts, and statistics of a parent."""
