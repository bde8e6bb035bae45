"""A run whose checkpoints are in a bucket, on a fake Google Cloud Storage.

The fake and the client are installed into a folder of their own, which the test's processes see.
"""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = """
from moe_jax import config as configs

def get_config():
    config = configs.default()
    config.model.update(
        vocab_size=259, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2,
    )
    config.data.update(source="text", sequence_length=32, validation_fraction=0.2)
    config.training.update(num_steps=40, batch_size=8, log_every=1)
    config.evaluation.update(batch_size=8, final_max_batches=1)
    config.checkpoint.update(every_steps=5, directory="gs://bucket/runs")
    return config
"""
SERVER = """
import sys, time
from gcp_storage_emulator.server import create_server
create_server("127.0.0.1", int(sys.argv[1]), in_memory=True, default_bucket="bucket").start()
print("ready", flush=True)
time.sleep(3600)
"""
LISTED = """
from etils import epath
print(*(path.name for path in epath.Path("gs://bucket/runs/run").iterdir()))
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packages")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(folder)]
    done = subprocess.run([*pip, "gcsfs", "gcp-storage-emulator"], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no fake bucket: {done.stderr.strip().splitlines()[-1:]}")
    port = 20_000 + os.getpid() % 20_000
    # Behind the project's own packages, so that nothing of them is replaced.
    (folder / "sitecustomize.py").write_text(f"import sys; sys.path.append({str(folder)!r})")
    site = tmp_path_factory.mktemp("site")
    (folder / "sitecustomize.py").rename(site / "sitecustomize.py")
    address = f"http://127.0.0.1:{port}"
    variables = os.environ | {
        "XDG_CACHE_HOME": str(site / "cache"),
        "PYTHONPATH": f"{ROOT}:{site}",
        "STORAGE_EMULATOR_HOST": address,
        "TENSORSTORE_GCS_HTTP_URL": address,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    }
    command = [sys.executable, "-c", SERVER, str(port)]
    server = subprocess.Popen(
        command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert server.stdout.readline() == "ready\n"
    yield variables
    server.kill()


@pytest.mark.long
def test_a_run_with_its_checkpoints_in_a_bucket_is_killed_and_goes_on(environment, tmp_path):
    (tmp_path / "config.py").write_text(CONFIG)
    (tmp_path / "text").mkdir()
    for i in range(9):
        (tmp_path / "text" / f"{i}.txt").write_text(f"{i} is a number of my own. " * 99)

    def started(*arguments):
        """Its output goes to a file: a pipe that nobody reads would stop it."""
        command, output = [sys.executable, *arguments], tmp_path / "output.txt"
        with output.open("w") as out, output.open("a") as err:
            return subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=out, stderr=err)

    def done(*arguments):
        process = started(*arguments)
        status, said = process.wait(timeout=120), (tmp_path / "output.txt").read_text()
        assert status == 0, said
        return said

    def steps():
        listing = subprocess.run(
            [sys.executable, "-c", LISTED], env=environment, capture_output=True, text=True
        )
        return sorted(int(name) for name in listing.stdout.split() if name.isdigit())

    train = (str(ROOT / "scripts" / "train.py"), "--config=config.py", "--workdir=run")
    broken = started(*train, "--config.training.num_steps=100000")
    while len(steps()) < 2 and broken.poll() is None:
        time.sleep(0.2)
    broken.send_signal(signal.SIGKILL)
    assert broken.wait() == -signal.SIGKILL, (tmp_path / "output.txt").read_text()
    last = str(steps()[-1] + 10)
    assert "going on from step" in done(*train, f"--config.training.num_steps={last}")
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert json.loads((tmp_path / "run" / "result.json").read_text())["steps"] == int(last)
    inspect = str(ROOT / "scripts" / "inspect_checkpoint.py")
    refused = started(inspect, "run").wait(), (tmp_path / "output.txt").read_text()
    assert refused[0] == 2 and "set MOE_JAX_CHECKPOINTS=gs://bucket/runs if" in refused[1]
    environment["MOE_JAX_CHECKPOINTS"] = "gs://bucket/runs"
    assert f"gs://bucket/runs/run/{last}" in done(inspect, "run", "--verify")
    evaluate = str(ROOT / "scripts" / "evaluate.py")
    assert "bits/byte" in done(evaluate, "--checkpoint=run", "--max_batches=1")


READ = """
import gzip, json, pathlib
from etils import epath
from moe_jax.data import sources
lines = b"".join(json.dumps({"text": f"text {n}"}).encode() + b"\\n" for n in range(2000))
folder = epath.Path("gs://bucket/text/deep")
(folder / "a.jsonl.gz").write_bytes(gzip.compress(lines))
(folder / "b.jsonl").write_bytes(lines)
here = pathlib.Path(".")
for spec in ("gs://bucket/text", "gs://bucket/text/*/*.jsonl*", "gs://bucket/text/deep/b.jsonl"):
    sources.check(spec)
    before = sources.fingerprint(spec, here)
    options = {"validation_fraction": 0.0, "data_dir": here}
    texts = [d.text for d in sources.documents(spec, "train", **options)]
    assert texts == [f"text {n}" for n in range(2000)] * (1 if spec.endswith("b.jsonl") else 2)
    assert sources.fingerprint(spec, here) == before and sources.describe(spec, here)
(folder / "b.jsonl").write_bytes(lines[:-9])
assert sources.fingerprint(spec, here) != before
try:
    list(sources.documents(spec, "train", **options))
except ValueError as error:
    print(error)
"""


@pytest.mark.long
def test_a_text_in_a_bucket_is_a_source(environment, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", READ], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "gs://bucket/text/deep/b.jsonl:2000 is not a JSON object" in done.stdout
    assert not list(tmp_path.iterdir())
