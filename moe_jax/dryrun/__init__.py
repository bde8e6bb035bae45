"""A run's train step compiled for devices that are not here, and read."""

from moe_jax.dryrun.report import Report, as_json, collectives_text, run, text

__all__ = ["Report", "as_json", "collectives_text", "run", "text"]
