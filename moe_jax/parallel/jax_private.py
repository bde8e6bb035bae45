"""Everything that moe_jax takes from the private modules of jax, which any release may change.

Each row was compared with the releases of jax that it names. A test compares it with the installed
one, and finds a private import anywhere else.
"""

import dataclasses
import importlib
import inspect
from collections.abc import Collection

import jax

RELEASES = ("0.10", "0.11", "0.12")


@dataclasses.dataclass(frozen=True)
class Private:
    module: str
    attribute: str
    uses: tuple[str, ...]  # attributes of it that are read, or parameters of it that are passed
    purpose: str
    releases: tuple[str, ...] = RELEASES  # of jax, in which all of this was seen


TABLE = {
    "state": Private(
        module="jax._src.distributed",
        attribute="global_state",
        uses=("client", "num_processes", "process_id"),
        purpose="who this process is, without asking for devices",
    ),
    "client": Private(
        module="jaxlib._jax",
        attribute="DistributedRuntimeClient",
        uses=("key_value_set", "key_value_dir_get", "wait_at_barrier"),
        purpose="text that processes tell each other beside the devices",
    ),
    "tpu_vm": Private(
        module="jax._src.clusters",
        attribute="GceTpuCluster",
        uses=("is_env_present", "get_process_count"),
        purpose="whether this machine is one of several Cloud TPU VMs",
    ),
    "cudnn_attention": Private(
        module="jax._src.cudnn.fused_attention_stablehlo",
        attribute="dot_product_attention",
        uses=("q_seqlen", "kv_seqlen", "q_offsets", "kv_offsets", "scale", "mask_type"),
        purpose="attention within packed documents, which jax.nn.dot_product_attention lacks",
    ),
    "cudnn_mask": Private(
        module="jax._src.cudnn.fused_attention_stablehlo",
        attribute="MaskType",
        uses=("PADDING_CAUSAL",),
        purpose="the mask of packed documents",
    ),
}


def load(name: str):
    """The private object of row `name`.

    Raises: ImportError, in one line, where the installed jax lacks it or a part that is used.
    """
    row = TABLE[name]
    lacks = f"{row.module}.{row.attribute}"
    try:
        found = getattr(importlib.import_module(row.module), row.attribute)
        for part in row.uses:
            lacks = f"{row.module}.{row.attribute} with {part}"
            if part not in _parts(found):
                raise AttributeError
    except (ImportError, AttributeError):
        raise ImportError(
            f"jax {jax.__version__} has no {lacks} ({row.purpose}); "
            f"install a jax of {', '.join(row.releases)}"
        ) from None
    return found


def _parts(found) -> Collection[str]:
    return inspect.signature(found).parameters if inspect.isfunction(found) else dir(found)


def process_id() -> int:
    return load("state").process_id


def process_count() -> int:
    return load("state").num_processes


def client():
    """The client of the coordination service; None in a process that is alone."""
    load("client")
    return load("state").client
