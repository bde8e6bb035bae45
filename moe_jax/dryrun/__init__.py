"""A run's train step compiled for devices that are not here, and read."""
