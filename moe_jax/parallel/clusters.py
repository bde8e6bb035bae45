"""Finds in the environment what started this process, and whether it is one of several.

JAX finds the rest (the address of process 0, the id of this process) when it is told the cluster.
"""

from collections.abc import Callable, Mapping

from moe_jax.parallel import jax_private


def _slurm(environ: Mapping[str, str]) -> int:
    """Counts the tasks of the step, not of the allocation: a command without srun runs alone."""
    return int(environ.get("SLURM_STEP_NUM_TASKS", 1)) if "SLURM_JOB_ID" in environ else 1


def _tpu_environment(environ: Mapping[str, str]) -> int:
    """A TPU slice on GKE, or wherever these are set; several slices are joined by Megascale."""
    hosts = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES", "")
    return len(hosts.split(",")) * int(environ.get("MEGASCALE_NUM_SLICES") or 1)


def _tpu_metadata(environ: Mapping[str, str]) -> int:
    """A Cloud TPU VM, whose metadata server is asked; JAX knows whether this machine is one."""
    cluster = jax_private.load("tpu_vm")
    if environ.get("JAX_PLATFORMS") == "cpu" or not cluster.is_env_present():
        return 1
    return cluster.get_process_count()


def _kubernetes(environ: Mapping[str, str]) -> int:
    """An Indexed Job, whose number of pods only its API knows (`pip install kubernetes`)."""
    return 2 if {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= set(environ) else 1


# The number of processes by JAX's name of the cluster, in JAX's order; 2 stands for "several".
CLUSTERS: dict[str, Callable[[Mapping[str, str]], int]] = {
    "ompi": lambda environ: int(environ.get("OMPI_COMM_WORLD_SIZE", 1)),
    "slurm": _slurm,
    "gketpu": _tpu_environment,
    "gcetpu": _tpu_metadata,
    "k8s": _kubernetes,
}


def detect(environ: Mapping[str, str]) -> str:
    """The name of the cluster that started this process as one of several, or ""."""
    return next((name for name, count in CLUSTERS.items() if count(environ) > 1), "")


def alone_on_host(environ: Mapping[str, str]) -> bool:
    """True if Slurm or Open MPI started one process a host, which then has all the host's devices.

    Otherwise JAX gives one device to each process that one of these started.
    """
    slurm = environ.get("SLURM_STEP_TASKS_PER_NODE", "").split("(")[0]
    return "1" in (slurm, environ.get("OMPI_COMM_WORLD_LOCAL_SIZE"))
