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
    if os.environ.get("JAX_PLATFORMS", "").startswith("cpu"):  # "tpu,cpu" prefers the TPU
        return "float32"
    if glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"):
        return "bfloat16"
    if not shutil.which("nvidia-smi"):
        return "float32"
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    said = subprocess.run(command, capture_output=True, text=True).stdout.split()
    known = [float(word) for word in said if re.fullmatch(r"\d+\.\d+", word)]
    return "bfloat16" if known and min(known) >= 8 else "float32"
