"""The text that comes with the package, as TFDS builders that do not need TensorFlow."""

from typing import Any

from moe_jax.data.corpora.builders import LoParallel19, LoParallel19Sealed, UdhrLanguages

BUILDERS: dict[str, Any] = {
    "lo_parallel19": LoParallel19,
    "udhr_languages": UdhrLanguages,
    "lo_parallel19_sealed": LoParallel19Sealed,
}
