"""Detects from the environment what launched this process, and whether it is one of several.

Given the cluster's name, JAX finds the rest: the address of process 0 and the id of this process.
"""

from collections.abc import Callable, Mapping

from moe_jax.parallel import jax_private


def _slurm(environ: Mapping[str, str]) -> int:
    """Counts the tasks of the step, not of the allocation: without srun a command runs alone."""
    return int(environ.get("SLURM_STEP_NUM_TASKS", 1)) if "SLURM_JOB_ID" in environ else 1


def _tpu_environment(environ: Mapping[str, str]) -> int:
    """A TPU slice on GKE or wherever these variables are set; Megascale joins several slices."""
    hosts = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES", "")
    return len(hosts.split(",")) * int(environ.get("MEGASCALE_NUM_SLICES") or 1)


def _tpu_metadata(environ: Mapping[str, str]) -> int:
    """A Cloud TPU VM, if JAX recognises this machine as one; asks its metadata server."""
    cluster = jax_private.load("tpu_vm")
    if environ.get("JAX_PLATFORMS") == "cpu" or not cluster.is_env_present():
        return 1
    return cluster.get_process_count()


def _kubernetes(environ: Mapping[str, str]) -> int:
    """An Indexed Job; only its API knows the number of pods (`pip install kubernetes`)."""
    return 2 if {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= set(environ) else 1


# JAX's name of a cluster -> the number of processes, in JAX's order; 2 stands for "several".
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
    """True if Slurm or Open MPI started one process per host, which then gets all its devices.

    Otherwise JAX gives one device to each process that they started.
    """
    slurm = environ.get("SLURM_STEP_TASKS_PER_NODE", "").split("(")[0]
    return "1" in (slurm, environ.get("OMPI_COMM_WORLD_LOCAL_SIZE"))
