"""Everything that moe_jax uses from the private modules of jax, which any release may change.

Each row was checked against the releases of jax named below. A test checks it against the installed
release, and fails for a private import anywhere else.
"""

import dataclasses
import importlib
import inspect

import jax

RELEASES = ("0.10", "0.11", "0.12")  # the jax releases that have all rows


@dataclasses.dataclass(frozen=True)
class Private:
    module: str
    attribute: str
    uses: tuple[str, ...]  # its attributes that we read, or its parameters that we pass
    purpose: str


TABLE = {
    "state": Private(
        *("jax._src.distributed", "global_state"),
        uses=("client", "num_processes", "process_id"),
        purpose="who this process is, without asking for devices",
    ),
    "client": Private(
        *("jaxlib._jax", "DistributedRuntimeClient"),
        uses=("key_value_set", "key_value_dir_get", "wait_at_barrier"),
        purpose="text that processes tell each other beside the devices",
    ),
    "tpu_vm": Private(
        *("jax._src.clusters", "GceTpuCluster"),
        uses=("is_env_present", "get_process_count"),
        purpose="whether this machine is one of several Cloud TPU VMs",
    ),
    "cudnn_attention": Private(
        *("jax._src.cudnn.fused_attention_stablehlo", "dot_product_attention"),
        uses=("q_seqlen", "kv_seqlen", "q_offsets", "kv_offsets", "scale", "mask_type"),
        purpose="attention within packed documents, which jax.nn.dot_product_attention lacks",
    ),
    "cudnn_mask": Private(
        *("jax._src.cudnn.fused_attention_stablehlo", "MaskType"),
        uses=("PADDING_CAUSAL",),
        purpose="the mask of packed documents",
    ),
}


def load(name: str):
    """The private object of row `name`.

    Raises: ImportError, in one line, if the installed jax lacks it or a part that is used.
    """
    row = TABLE[name]
    lacks = f"{row.module}.{row.attribute}"
    try:
        found = getattr(importlib.import_module(row.module), row.attribute)
        parts = inspect.signature(found).parameters if inspect.isfunction(found) else dir(found)
        for part in row.uses:
            lacks = f"{row.module}.{row.attribute} with {part}"
            if part not in parts:
                raise AttributeError
    except (ImportError, AttributeError):
        raise ImportError(
            f"jax {jax.__version__} has no {lacks} ({row.purpose}); "
            f"install a jax of {', '.join(RELEASES)}"
        ) from None
    return found


def process_id() -> int:
    return load("state").process_id


def process_count() -> int:
    return load("state").num_processes


def client():
    """The client of the coordination service; None in a single-process run."""
    load("client")
    return load("state").client
