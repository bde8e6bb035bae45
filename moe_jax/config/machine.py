"""Finds out about this machine without initialising JAX."""

import glob
import os
import re
import shutil
import subprocess


def dtype_here() -> str:
    """The dtype to compute in on this machine: bfloat16 if its chips have units for it.

    It does not ask JAX, which must not be initialised before the processes of a run have joined.
    A T4 (compute capability 7.5) has no such units, and float32 is faster there.
    """
    if not has_accelerator():
        return "float32"
    if _has_tpu():
        return "bfloat16"
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    said = subprocess.run(command, capture_output=True, text=True).stdout.split()
    known = [float(word) for word in said if re.fullmatch(r"\d+\.\d+", word)]
    return "bfloat16" if known and min(known) >= 8 else "float32"


def has_accelerator() -> bool:
    """This machine has a TPU or a GPU, and JAX was not told to use the CPU."""
    if os.environ.get("JAX_PLATFORMS", "").startswith("cpu"):  # "tpu,cpu" prefers the TPU
        return False
    return _has_tpu() or shutil.which("nvidia-smi") is not None


def _has_tpu() -> bool:
    return bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"))
