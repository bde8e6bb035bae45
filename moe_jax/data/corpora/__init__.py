"""The text that comes with the package, as TFDS builders that need no TensorFlow."""

from moe_jax.data.corpora.builders import LoParallel19, UdhrLanguages

BUILDERS = {"lo_parallel19": LoParallel19, "udhr_languages": UdhrLanguages}

__all__ = ["BUILDERS", "LoParallel19", "UdhrLanguages"]
