"""Compiler flags per chip, each with its reason; `scripts/xla_flags.py` prints them for a shell.

The list is short on purpose: no row repeats a compiler's default, and a TPU flag is here only if it
changes how the compiler handles an all-gather, an exchange and a reduce-scatter between products.
This was checked in compiled programs (libtpu 0.0.42). We timed nothing on these chips; the reasons
say who timed what. These were left out: `xla_tpu_enable_async_collective_fusion` and its `fuse_…`
flags (no change), SparseCore offload on v6e (16% more memory for unmeasured speed; the default on
tpu7x), and `xla_tpu_enable_data_parallel_all_reduce_opt` (for several slices).

Sources: openxla/xla docs/flags_guidance.md (defaults, meanings); MaxText
benchmarks/xla_flags_library.py (limits of VMEM); NVIDIA JAX-Toolbox, "Tips for High-Performance
LLMs with JAX and XLA"; marin-community/marin issues by number.
"""

import dataclasses
import shlex


@dataclasses.dataclass(frozen=True)
class Flag:
    name: str
    value: str
    reason: str

    def __str__(self) -> str:
        return f"--{self.name}={self.value}"


@dataclasses.dataclass(frozen=True)
class FlagSet:
    """`variable` is the environment variable that the chip's compiler reads once, at its start."""

    variable: str
    flags: tuple[Flag, ...]

    def __str__(self) -> str:
        return " ".join(map(str, self.flags))


ASYNC_ALL_TO_ALL = Flag(
    "xla_tpu_enable_async_all_to_all",
    "true",
    "expert parallelism's exchange of tokens becomes a start and a done with work between them; "
    "by default all wait for it",
)
# The default is 16 MiB. XLA does not refuse a limit beyond the chip's VMEM.
VMEM = Flag(
    "xla_tpu_scoped_vmem_limit_kib",
    "81920",
    "a fusion may use 80 of the 128 MiB of VMEM, for larger tiles of the experts' products; "
    "MaxText's value for Mixtral, 52.6% MFU on v5p",
)
SMALL_VMEM = dataclasses.replace(
    VMEM, value="61440", reason="60 of the 64 MiB of VMEM a core: larger tiles, as on the others"
)
ASYNC_ALL_GATHER = Flag(
    "xla_enable_async_all_gather",
    "true",
    "fsdp's gather of the next weights overlaps with products; later chips do so by default",
)

COMBINED = {
    "all_gather": "fsdp gathers all leaves of a layer in one collective instead of one each",
    "reduce_scatter": "the same for the gradients of a layer",
    "all_reduce": "the same where the data axis replicates parameters",
}
GPU = (
    Flag(
        "xla_gpu_enable_latency_hiding_scheduler",
        "false",
        "its schedule corrupted the first backward pass around ragged exchanges (marin#8081), and "
        "on MoE steps it gained nothing (marin#6493: 0.3%)",
    ),
    *(
        Flag(f"xla_gpu_{collective}_combine_threshold_bytes", str(2**30), reason)
        for collective, reason in COMBINED.items()
    ),
    Flag(
        "xla_gpu_enable_triton_gemm",
        "false",
        "cuBLAS for the dense products, as NVIDIA's own JAX recipes for language models set it",
    ),
)

CHIPS = {
    "v4": FlagSet("LIBTPU_INIT_ARGS", (ASYNC_ALL_TO_ALL, ASYNC_ALL_GATHER)),
    "v5e": FlagSet("LIBTPU_INIT_ARGS", (ASYNC_ALL_TO_ALL, VMEM)),
    "v5p": FlagSet("LIBTPU_INIT_ARGS", (ASYNC_ALL_TO_ALL, VMEM)),
    "v6e": FlagSet("LIBTPU_INIT_ARGS", (ASYNC_ALL_TO_ALL, VMEM)),
    "tpu7x": FlagSet("LIBTPU_INIT_ARGS", (ASYNC_ALL_TO_ALL, SMALL_VMEM)),
    "gpu": FlagSet("XLA_FLAGS", GPU),
}


def export(chip: str) -> str:
    """A shell line that sets a chip's flags; flags already set come last and take precedence."""
    variable = CHIPS[chip].variable
    return f'export {variable}={shlex.quote(str(CHIPS[chip]))}"${{{variable}:+ ${variable}}}"'
