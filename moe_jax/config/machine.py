"""What this machine has, found without starting jax."""

import glob
import os
import re
import shutil
import subprocess


def dtype_here() -> str:
    """The dtype to compute in on this machine: bfloat16 where a chip has units for it.

    It asks the machine and not jax, which may not be started before the processes of a run know of
    each other. A T4 (compute capability 7.5) has no such units, and float32 is faster there.
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
