"""The launchers, run: against clouds and schedulers that record what they are asked, and for real.

The fake gcloud runs what is sent to a worker in a folder of that worker's, where a fake python
stands for train.py; so what arrives there is what the person typed, through two shells and a tar.
"""

import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "scripts").glob("*.sh"))
RECORD = """#!{python}
import json, sys
with open({log!r}, "a") as log:
    log.write(json.dumps([{name!r}, *sys.argv[1:]]) + "\\n")
"""
# The fakes record their calls, and more. gcloud: the states of the queued resource come one by one,
# the last for ever; a command for workers is run in each one's home.
GCLOUD = """
import os, pathlib, re, shutil, subprocess
home = pathlib.Path({home!r})
option = dict(a.split("=", 1) for a in sys.argv if a.startswith("--") and "=" in a)
workers = {{"all": "01"}}.get(option.get("--worker"), option.get("--worker"))
if "describe" in sys.argv:
    states = (home / "states").read_text().split()
    (home / "states").write_text(" ".join(states[1:] or states))
    print(states[0].replace("GONE", ""))
for worker in workers or "":
    folder = home / worker
    if "scp" in sys.argv:
        shutil.copy(sys.argv[5], folder / sys.argv[6].split(":")[1])
    else:
        subprocess.run(["bash", "-c", option["--command"]], cwd=folder, check=True)
"""
# python of a worker: it keeps to itself what it is told to install and to train.
WORKER_PYTHON = """#!/usr/bin/env bash
case $1 in
-c) exec {python} "$@" ;;
-m) printf '%s\\n' "$*" >>installed ;;
scripts/xla_flags.py) echo "export LIBTPU_INIT_ARGS=flags-of-$2" ;;
scripts/train.py)
    printf '%s\\n' "$LIBTPU_INIT_ARGS" "$JAX_PLATFORMS" "${{@:2}}" >arguments
    trap 'exit 75' TERM
    touch ready
    while true; do sleep 0.05; done
    ;;
esac
"""


def script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


class Fakes:
    """Programs first in PATH that record how they were called, and do `body` besides."""

    def __init__(self, folder):
        self.folder, self.log = folder, folder / "log"
        self.environ = {
            **os.environ,
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "TPU_VM_POLL_SECONDS": "0",
        }

    def add(self, name, body=""):
        text = RECORD.format(python=sys.executable, log=str(self.log), name=name)
        script(self.folder / "bin" / name, text + body)

    def run(self, name, *arguments, **environ):
        """Runs a script of this repository; what was called meanwhile is in `calls`."""
        self.log.write_text("")
        ended = subprocess.run(
            ["bash", f"scripts/{name}", *arguments],
            cwd=ROOT,
            env={**self.environ, **environ},
            capture_output=True,
            text=True,
            timeout=60,
        )
        self.calls = [json.loads(line) for line in self.log.read_text().splitlines()]
        return ended


# The TPU VM ---------------------------------------------------------------------------------------

VM = ("mine", "--zone=us-east5-a", "--type=v5p-16", "--spot")
TRAINING = (
    "--config=configs/quickstart.py",
    "--workdir=/mnt/run 1",
    "--config.data.source=/a/*.txt",
)


@pytest.fixture
def cloud(tmp_path):
    fakes = Fakes(tmp_path)
    fakes.add("gcloud", GCLOUD.format(home=str(tmp_path)))
    for worker in "01":
        venv = tmp_path / worker / "moe_jax" / ".venv" / "{}.{}".format(*sys.version_info)
        script(venv / "bin" / "python", WORKER_PYTHON.format(python=sys.executable))
        (venv / "bin" / "activate").write_text(f'PATH="{venv}/bin:$PATH"')
    script(tmp_path / "bin" / "python3", f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (tmp_path / "states").write_text("WAITING_FOR_RESOURCES PROVISIONING ACTIVE")
    yield fakes
    fakes.run("tpu_vm.sh", "stop", *VM)


def until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.05)


def test_a_tpu_vm_from_its_creation_over_a_preemption_to_its_end(cloud, tmp_path):
    group = ["gcloud", "compute", "tpus"]
    create = ["queued-resources", "create", "mine", "--zone=us-east5-a", "--node-id=mine"]
    create += ["--accelerator-type=v5p-16", "--runtime-version=v2-alpha-tpuv5", "--spot"]
    describe = ["queued-resources", "describe", "mine", "--zone=us-east5-a"]
    describe += ["--format=value(state.state)"]
    delete = ["queued-resources", "delete", "mine", "--zone=us-east5-a", "--force", "--quiet"]

    assert cloud.run("tpu_vm.sh", "create", *VM).stdout.split("\n")[-2] == "mine is ACTIVE"
    assert cloud.calls == [group + create, *[group + describe] * 3]

    cloud.run("tpu_vm.sh", "setup", *VM)
    started = cloud.run("tpu_vm.sh", "run", *VM, *TRAINING)
    assert started.stdout.count("started") == 2, started
    again = cloud.run("tpu_vm.sh", "run", *VM, *TRAINING)
    assert again.returncode and "training already" in again.stderr
    for folder in (tmp_path / worker / "moe_jax" for worker in "01"):
        assert "pip install" in (folder / "installed").read_text()
        assert "jax[tpu]==" in (folder / "installed").read_text()
        until((folder / "ready").exists)
        flags, platforms, *arguments = (folder / "arguments").read_text().splitlines()
        assert flags == "flags-of-v5p"
        assert platforms == os.environ["JAX_PLATFORMS"]
        assert arguments == list(TRAINING)

    assert cloud.run("tpu_vm.sh", "status", *VM).stdout.count("running") == 2
    cloud.run("tpu_vm.sh", "stop", *VM)
    until(lambda: cloud.run("tpu_vm.sh", "status", *VM).stdout.count("ended with 75") == 2)

    (tmp_path / "states").write_text("SUSPENDED PROVISIONING ACTIVE")
    resumed = cloud.run("tpu_vm.sh", "resume", *VM, *TRAINING)
    assert resumed.stdout.count("started") == 2, resumed
    queue = [call for call in cloud.calls if "queued-resources" in call]
    assert queue == [group + verb for verb in (describe, delete, create, describe, describe)]

    resumed = cloud.run("tpu_vm.sh", "resume", *VM, *TRAINING)
    assert resumed.stdout.count("running") == 2 and len(cloud.calls) == 2, resumed

    cloud.run("tpu_vm.sh", "delete", *VM)
    assert cloud.calls == [group + delete]


@pytest.mark.parametrize(
    ("states", "verbs"),
    [
        ("ACTIVE", ["describe"]),
        ("WAITING_FOR_RESOURCES ACTIVE", ["describe", "describe"]),
        ("FAILED ACTIVE", ["describe", "delete", "create", "describe"]),
        ("GONE ACTIVE", ["describe", "create", "describe"]),
        ("SUSPENDING", ["describe"]),
    ],
)
def test_resume_asks_anew_only_for_what_is_gone(states, verbs, cloud, tmp_path):
    (tmp_path / "states").write_text(states)
    (tmp_path / "bin" / "git").symlink_to(shutil.which("true"))  # no files to send
    cloud.run("tpu_vm.sh", "resume", *VM, *TRAINING)
    assert [call[4] for call in cloud.calls if "queued-resources" in call] == verbs


@pytest.mark.parametrize("command", ["create", "setup", "run", "logs", "resume", "stop", "delete"])
def test_a_dry_run_prints_what_would_be_called_and_calls_nothing(command, cloud):
    training = TRAINING if command in ("run", "resume") else ()
    printed = cloud.run("tpu_vm.sh", command, *VM, *training, "--dry_run")
    assert printed.returncode == 0 and not cloud.calls
    lines = [shlex.split(line) for line in printed.stdout.splitlines()]
    assert lines and all(line[:3] == ["gcloud", "compute", "tpus"] for line in lines)
    if command == "run":
        cloud.run("tpu_vm.sh", command, *VM, *training)
        assert cloud.calls == lines


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("start mine --zone=z", "'start' is none of create, setup"),
        ("create --zone=z", "the VM's name is missing"),
        ("create mine --type=v5p-8", "--zone=ZONE is missing"),
        ("create mine --zone=z --type=h100", "--type=h100 is none of v4-N, v5litepod-N"),
        ("create mine --zone=z --type=v5p-12", "N counts cores, 8 to a host; use v5p-8, v5p-16"),
        ("create mine --zone=z --type=v5p-2x2x2", "N counts cores"),
        ("create mine --zone=z --type=v6e-12", "N counts chips; use 1, 4, 8"),
        ("create mine --zone=z --type=v5p-8 --sport", "create does not know --sport"),
        ("run mine --zone=z --type=v5p-8 --workdir=runs/a", "--workdir=runs/a goes with the VM"),
        ("run mine --zone=z --type=v5p-8 --workdir=gs://a/b", "mount the bucket"),
        ("delete mine --zone=z", "gcloud is not here; install"),
    ],
)
def test_a_mistake_is_one_line_that_says_what_to_do(arguments, complaint, tmp_path):
    fakes = Fakes(tmp_path)
    for name in ("bash", "sed", "dirname"):  # all there is, so no gcloud
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).symlink_to(shutil.which(name))
    ended = fakes.run("tpu_vm.sh", *arguments.split(), PATH=str(tmp_path / "bin"))
    assert ended.returncode == 2 and complaint in ended.stderr
    assert ended.stderr.count("\n") == 1 and not ended.stdout


@pytest.mark.long
def test_gcloud_knows_every_command_and_flag(cloud):
    if not shutil.which("gcloud"):
        pytest.skip("no gcloud here to ask")
    for command in ("setup", "logs", "resume", "stop"):
        training = TRAINING if command == "resume" else ()
        printed = cloud.run("tpu_vm.sh", command, *VM, "--project=p", *training, "--dry_run")
        for line in printed.stdout.splitlines():
            lint = ["gcloud", "meta", "lint-gcloud-commands", f"--command-string={line}"]
            said = subprocess.run(lint, capture_output=True, text=True, check=True).stdout
            assert json.loads(said)[0]["success"], said[-2000:]


# Slurm --------------------------------------------------------------------------------------------

SRUN = """
import os, signal, time
def stop(*_):
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
if ending := os.environ.get("STEP_ENDS_WITH"):
    sys.exit(int(ending))
os.kill(os.getppid(), signal.SIGTERM)  # what --signal=B:TERM@120 does
time.sleep(60)
"""
SCANCEL = """
import os, signal, subprocess
step = subprocess.run(["pgrep", "-f", {srun!r}], capture_output=True, text=True).stdout
os.kill(int(step), signal.SIGTERM)
"""


@pytest.fixture
def slurm(tmp_path):
    fakes = Fakes(tmp_path)
    fakes.add("srun", SRUN)
    fakes.add("scancel", SCANCEL.format(srun=str(tmp_path / "bin" / "srun")))
    fakes.add("squeue", "import os; print(os.environ['STATE'])")
    fakes.add("scontrol")
    script(tmp_path / "bin" / "python", f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    return fakes


def test_a_job_near_its_end_saves_and_queues_itself_again(slurm):
    ended = slurm.run("slurm_train.sh", *TRAINING, SLURM_JOB_ID="7", STATE="RUNNING")
    assert ended.returncode == 75, ended
    assert slurm.calls == [
        ["srun", "python", "scripts/train.py", *TRAINING],
        ["scancel", "--signal=TERM", "7"],
        ["squeue", "--noheader", "--jobs", "7", "--format", "%T"],
        ["scontrol", "requeue", "7"],
    ]


@pytest.mark.parametrize(
    ("status", "state"), [(0, "RUNNING"), (2, "RUNNING"), (3, "RUNNING"), (75, "CANCELLED")]
)
def test_a_job_that_is_done_wrong_or_cancelled_does_not_come_back(status, state, slurm):
    environ = {"SLURM_JOB_ID": "7", "STATE": state, "STEP_ENDS_WITH": str(status)}
    assert slurm.run("slurm_train.sh", **environ).returncode == status
    assert "scontrol" not in [call[0] for call in slurm.calls]


def test_slurm_script_outside_a_job_says_how_to_submit_it(tmp_path):
    ended = Fakes(tmp_path).run("slurm_train.sh", "--config=a.py", SLURM_JOB_ID="")
    assert ended.returncode == 2
    assert ended.stderr == (
        "slurm_train.sh: runs inside a job: sbatch scripts/slurm_train.sh --config=a.py\n"
    )


# All ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_is_content(path):
    folders = f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
    command = [shutil.which("shellcheck", path=folders), "--external-sources", path]
    checked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
