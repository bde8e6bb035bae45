"""Detecting that a process was started as one of several."""

import pytest

from moe_jax.parallel import clusters, distributed

SRUN = {"SLURM_JOB_ID": "7", "SLURM_STEP_NUM_TASKS": "4"}
TPU = {"TPU_WORKER_HOSTNAMES": "t0,t1", "TPU_WORKER_ID": "1"}
ENVIRONMENTS = {
    "a laptop": ({}, ""),
    "srun of four tasks": (SRUN, "slurm"),
    # The allocation has four tasks, but this command is none of them.
    "a batch script without srun": ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}, ""),
    "srun of one task, as of a sweep": (SRUN | {"SLURM_STEP_NUM_TASKS": "1"}, ""),
    "mpirun": ({"OMPI_COMM_WORLD_SIZE": "2"}, "ompi"),
    "a TPU slice of two hosts": (TPU, "gketpu"),
    "a TPU slice of one host": (TPU | {"TPU_WORKER_HOSTNAMES": "localhost"}, ""),
    "two TPU slices of one host": (
        {"TPU_WORKER_HOSTNAMES": "t0", "MEGASCALE_NUM_SLICES": "2"},
        "gketpu",
    ),
    "an Indexed Job": ({"KUBERNETES_SERVICE_HOST": "k", "JOB_COMPLETION_INDEX": "0"}, "k8s"),
    "another pod": ({"KUBERNETES_SERVICE_HOST": "k"}, ""),
}


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_only_a_process_that_was_started_with_others_joins_them(name):
    environ, expected = ENVIRONMENTS[name]
    assert clusters.detect({"JAX_PLATFORMS": "cpu"} | environ) == expected


@pytest.mark.parametrize(
    "environ, alone",
    [
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x2)"}, True),
        ({"SLURM_STEP_TASKS_PER_NODE": "1"}, True),
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x2)"}, False),
        ({"SLURM_STEP_TASKS_PER_NODE": "1,2"}, False),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, True),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "8"}, False),
        ({}, False),
    ],
)
def test_one_process_a_host_has_all_of_its_devices(environ, alone):
    assert clusters.alone_on_host(environ) == alone


@pytest.mark.parametrize(
    "flags, complaint",
    [
        (("host:1", 2, None), "--process_id is missing"),
        (("host:1", None, 0), "--num_processes is missing"),
        (("", 2, 0), "--coordinator is missing"),
        (("", 2, None), "--coordinator is missing"),
        (("host", 2, 0), "use HOST:PORT"),
        (("host:1", 2, 2), "--process_id=2 is not from 0 to --num_processes=2"),
        (("host:1", 0, 0), "--process_id=0 is not from 0"),
    ],
)
def test_half_given_flags_are_refused_in_one_line(flags, complaint):
    with pytest.raises(ValueError, match=complaint) as error:
        distributed.check_flags(*flags)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("flags", [("", None, None), ("", 1, None), ("host:1", 2, 1)])
def test_all_flags_or_none_or_alone_are_taken(flags):
    distributed.check_flags(*flags)
