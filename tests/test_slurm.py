"""scripts/slurm_train.sh on a real Slurm of one node, started for the test."""

import csv
import importlib.util
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGES = ["slurm-wlm", "munge"]
SLURM_CONF = """
ClusterName=moe_jax
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SelectType=select/linear
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=sched_interval=2,bf_interval=2
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus}
PartitionName=low Nodes={host} Default=YES PriorityTier=1
PartitionName=high Nodes={host} PriorityTier=2
"""
CONFIG = """
from moe_jax import config as configs

def get_config():
    config = configs.default()
    config.model.update(
        vocab_size=259, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_experts=4, num_experts_per_tok=2,
    )
    config.data.update(source={text!r}, sequence_length=32, cache_dir={cache!r})
    config.data.validation_fraction = 0.2
    config.training.update(num_steps=10, batch_size=8, log_every=1)
    return config
"""
PATIENCE = 300  # seconds


def until(condition, what):
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"not in {PATIENCE} s: {what()}"
        time.sleep(1)


def install():
    """The programs from Debian's packages, or a skip that says what is missing."""
    if all(map(shutil.which, ("munged", "slurmctld", "slurmd", "sbatch"))):
        return
    if os.geteuid() or not shutil.which("apt-get"):
        pytest.skip(f"no Slurm here, and no root with apt-get to install {' '.join(PACKAGES)}")
    environ = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    command = ["apt-get", "install", "--yes", "--no-install-recommends", *PACKAGES]
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"apt-get cannot install {' '.join(PACKAGES)}: {done.stderr[-200:]}")


def free_ports(number):
    sockets = [socket.socket() for _ in range(number)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


SWEEP = """

def get_sweep():
    whole = {"training.num_steps": 3000, "checkpoint.every_steps": 100, "training.log_to": ()}
    return [{"name": name, "overrides": {**whole, "seed": seed}} for seed, name in enumerate("ab")]
"""


class Slurm:
    def __init__(self, folder):
        self.folder = folder
        self.environ = {
            **os.environ,
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        self.environ.pop("XLA_FLAGS")  # of the tests

    def ask(self, *command):
        done = subprocess.run(
            command, cwd=ROOT, env=self.environ, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    def submit(self, *options, name, **keys):
        training = [f"--config={self.folder}/config.py", f"--workdir={self.folder}/{name}"]
        training += [f"--config.{key}={value}" for key, value in keys.items()]
        output = f"--output={self.folder}/%j.log"
        return self.ask(
            "sbatch", "--parsable", output, *options, "scripts/slurm_train.sh", *training
        )

    def job(self, number):
        fields = self.ask("scontrol", "show", "job", "--oneliner", number).split()
        return dict(field.split("=", 1) for field in fields if "=" in field)

    def printed(self, number):
        return (self.folder / f"{number}.log").read_text()

    def steps(self, name):
        path = self.folder / name / "metrics.jsonl"
        rows = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
        return [row["step"] for row in rows if "loss" in row]

    def wait(self, number, condition):
        def what():
            return f"{self.job(number)} {self.printed(number)[-2000:]}"

        until(lambda: condition(self.job(number)), what)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    install()
    if os.geteuid():
        pytest.skip("a Slurm of one's own needs root")
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("state", "spool", "text"):
        (folder / name).mkdir()
    for i in range(20):
        text = " ".join(f"{(i * 7919 + j * 104729) % 4096:x}" for j in range(200))
        (folder / "text" / f"{i}.txt").write_text(text)
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    host = socket.gethostname().split(".")[0]
    conf = SLURM_CONF.format(host=host, ports=free_ports(2), folder=folder, cpus=os.cpu_count())
    (folder / "slurm.conf").write_text(conf)
    config = CONFIG.format(text=str(folder / "text"), cache=str(folder / "cache"))
    (folder / "config.py").write_text(config)

    cluster = Slurm(folder)
    munge = ["munged", "--foreground", "--force", f"--key-file={key}"]
    munge += [f"--{name}={folder}/munge.{name}" for name in ("socket", "pid-file", "log-file")]
    munge += [f"--seed-file={folder}/munge.seed"]
    daemons = []
    with (folder / "daemons.log").open("w") as log:
        for command in (munge, ["slurmctld", "-D", "-i"], ["slurmd", "-D", "-N", host]):
            daemons.append(subprocess.Popen(command, env=cluster.environ, stdout=log, stderr=log))
            if command is munge:
                until((folder / "munge.socket").exists, (folder / "daemons.log").read_text)
    try:
        idle = ["sinfo", "--noheader", "--format=%T"]
        environ = cluster.environ

        def is_idle():
            said = subprocess.run(idle, env=environ, capture_output=True, text=True).stdout
            return said.split() == ["idle"]

        until(is_idle, (folder / "daemons.log").read_text)
        yield cluster
        for number in cluster.ask("squeue", "--noheader", "--format=%i").split():
            cluster.ask("scancel", "--signal=KILL", "--full", number)
            cluster.ask("scancel", number)
        until(lambda: not cluster.ask("squeue", "--noheader"), lambda: "jobs do not end")
    finally:
        for daemon in reversed(daemons):
            daemon.send_signal(signal.SIGTERM)
        for daemon in daemons:
            daemon.wait(30)


@pytest.mark.long
def test_a_job_trains_to_its_end(slurm):
    job = slurm.submit(name="whole")
    slurm.wait(job, lambda job: job["JobState"] == "COMPLETED")
    assert slurm.steps("whole")[-1] == 10
    assert "done: 10 steps" in slurm.printed(job)


@pytest.mark.long
def test_a_mistake_ends_the_job_with_its_status(slurm):
    job = slurm.submit(name="mistake", **{"model.nonesuch": 1})
    slurm.wait(job, lambda job: job["JobState"] == "FAILED")
    assert slurm.job(job)["ExitCode"] == "2:0"


@pytest.mark.long
def test_a_job_goes_on_after_the_end_of_its_time_and_after_preemption_until_cancelled(slurm):
    # Slurm sends the signal up to a minute early.
    long = {"training.num_steps": 10**6, "checkpoint.every_steps": 10**6}
    job = slurm.submit("--time=2", "--signal=B:TERM@60", name="long", **long)
    slurm.wait(job, lambda job: job["Restarts"] == "1")
    assert "saved, run again to go on" in slurm.printed(job)
    first = slurm.steps("long")[-1]

    slurm.wait(job, lambda job: slurm.steps("long")[-1] > first)
    slurm.submit("--partition=high", name="urgent")
    slurm.wait(job, lambda job: job["Restarts"] == "2")
    second = slurm.steps("long")[-1]
    slurm.wait(job, lambda job: slurm.steps("long")[-1] > second)

    slurm.ask("scancel", job)
    slurm.wait(job, lambda job: job["JobState"] == "CANCELLED")
    steps = slurm.steps("long")
    assert steps == sorted(set(steps)), "a step that was saved was trained again"


@pytest.mark.long
def test_a_sweep_submits_its_runs_goes_on_after_a_kill_and_a_requeued_job_finishes(slurm):
    if importlib.util.find_spec("submitit") is None:
        pytest.skip("submitit, an optional extra, is not installed")
    (slurm.folder / "sweep.py").write_text((slurm.folder / "config.py").read_text() + SWEEP)
    workdir = slurm.folder / "sweep"
    command = [sys.executable, "scripts/sweep.py", f"--config={slurm.folder}/sweep.py"]
    command += [f"--workdir={workdir}", "--launcher=slurm"]
    command += ["--slurm.partition=low", "--slurm.timeout_min=30"]

    def start():
        how = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, cwd=ROOT, env=slurm.environ, **how)

    def numbers():
        return {path.parent.name[0]: path for path in workdir.glob("*/slurm_job.txt")}

    sweep = start()
    until(lambda: len(numbers()) == 2, lambda: "no two jobs")
    jobs = {name: path.read_text().strip() for name, path in numbers().items()}
    sweep.kill()  # its jobs go on
    sweep.communicate()
    sweep = start()

    [first] = [name for name, job in jobs.items() if slurm.job(job)["JobState"] == "RUNNING"]
    path = next(workdir.glob(f"{first}-*"))
    until(lambda: slurm.steps(f"sweep/{path.name}")[-1:] > [100], lambda: "no step")
    slurm.ask("scontrol", "requeue", jobs[first])
    said, _ = sweep.communicate(timeout=2 * PATIENCE)
    assert sweep.returncode == 0, said
    assert slurm.job(jobs[first])["Restarts"] == "1"
    for run in workdir.glob("[ab]-*"):
        steps = slurm.steps(f"sweep/{run.name}")
        assert steps[-1] == 3000 and steps == sorted(set(steps))
    with open(workdir / "results.csv") as file:
        assert [row["status"] for row in csv.DictReader(file)] == ["done", "done"]
    accounted = slurm.ask("squeue", "--noheader", "--states=all", "--format=%i").split()
    assert len([job for job in accounted if job in jobs.values()]) == 2, "submitted twice"
