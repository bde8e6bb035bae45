"""A sweep in a folder whose runs are executed by a stand-in for scripts/train.py."""

from moe_jax.sweep import execution, launchers, plan

CONFIG = """
from moe_jax import config as configs

def get_config():
    config = configs.default()
    config.model.preset = "quickstart"
    return config

def get_sweep():
    return SWEEP
"""
# What it does depends on the seed: 13 fails, 14 fails at the first try, 2 is a mistake, 60 waits;
# others leave a result with the loss 2 + seed / 10.
TRAIN = """
import json, os, pathlib, sys, time
flags = dict(flag.removeprefix("--").split("=", 1) for flag in sys.argv[1:])
workdir, seed = pathlib.Path(flags["workdir"]), flags.get("config.seed", "0")
with open(workdir.parent / "order.txt", "a") as order:
    order.write(workdir.name.rsplit("-", 1)[0] + chr(10))
source = flags.get("config.init.source")
if source is not None:
    assert (pathlib.Path(source.partition("@")[0]) / "result.json").exists()
if seed == "13":
    sys.exit("train.py: out of luck")
begun = (workdir / "config.json").exists()
(workdir / "config.json").write_text("{}")
if seed == "14" and not begun:
    sys.exit("train.py: out of luck, once")
if seed == "22":
    print("train.py: a mistake")
    sys.exit(2)
if seed == "60":
    time.sleep(60)
if "SHARES" in os.environ:
    time.sleep(1)  # both are at work
    shares = [sorted(os.sched_getaffinity(0)), os.environ.get("OMP_NUM_THREADS")]
    (workdir / "share.json").write_text(json.dumps(shares))
result = {"steps": 1, "loss": 2 + int(seed) / 10, "bits_per_byte": 3.0, "seconds": 5.0}
(workdir / "result.json").write_text(json.dumps(result))
"""


def write(folder):
    (folder / "train.py").write_text(TRAIN)
    (folder / "out").mkdir()


def train(folder):
    return ["python", str(folder / "train.py")]


def read(folder, entries):
    path = folder / "config.py"
    path.write_text(CONFIG.replace("SWEEP", repr(entries)))
    return plan.read(str(path), folder / "out")


def execute(folder, runs, *, max_parallel=1, **options):
    launcher = launchers.Local(train(folder), max_parallel)
    how = {"max_parallel": max_parallel, **options}
    return execution.Execution(runs, launcher, folder / "out", **how).execute()


def order(folder):
    return (folder / "out" / "order.txt").read_text().split()


def entry(name, after=(), **overrides):
    return {"name": name, "overrides": overrides, "after": list(after)}
