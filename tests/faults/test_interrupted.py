"""Runs that are killed, inside saves too, stopped by signals, or out of disk: no state is wrong, no
good checkpoint is lost, and what goes on ends bitwise like the run that nothing disturbed."""

import contextlib
import os
import pathlib
import random
import re
import resource
import signal
import subprocess
import time

import pytest

from moe_jax import stopping
from moe_jax.training import checkpoint
from tests.faults import runs

SECONDS_TO_STOP = 5
DELETES = "--config.checkpoint.keep=2"  # saves delete older checkpoints
SAVE, MOMENT = "killed in a save", "killed at any moment"
SIGNAL, DISK = "stopped by a signal", "out of disk"
KINDS = (SAVE, MOMENT, SIGNAL, DISK)
LARGEST_FILE = 60_000  # bytes; of a run out of disk, whose checkpoints have a larger one
# Together 51 kills, 31 of them in saves, and 31 signals.
WAYS = {
    "short": [SAVE, SIGNAL],
    **{f"long-{n}": [SAVE] * 6 + [MOMENT] * 4 + [SIGNAL] * 6 + [DISK] for n in range(1, 6)},
}


@pytest.mark.parametrize(
    "chain", ["short", *(pytest.param(n, marks=pytest.mark.long) for n in WAYS if n != "short")]
)
def test_a_run_that_is_killed_and_stopped_loses_nothing_and_ends_bitwise_like_the_unbroken_one(
    chain, config_file, unbroken, tmp_path, figure, heard
):
    """A workdir's run is started and ended again until it is done; then comes another workdir."""
    whole, seconds = unbroken
    rng, counts = random.Random(chain), dict.fromkeys((*KINDS, "done before"), 0)
    counts |= {"wrong states": 0, "lost checkpoints": 0, "most seconds to stop": 0}
    ways, workdir, newest = WAYS[chain].copy(), tmp_path / "0", 0
    rng.shuffle(ways)
    for start in range(3 * len(ways)):  # a kill may come after the save, or after the end
        before = runs.unfinished(workdir)
        dump = tmp_path / "compiled" / str(start)
        process = runs.start(config_file, workdir, DELETES, JAX_DUMP_IR_TO=str(dump))
        if ways[-1] == DISK:
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (LARGEST_FILE,) * 2)
        wait_for(ways[-1], process, workdir, rng, seconds)
        saved = max(checkpoint.steps(workdir / "checkpoints"), default=0)
        if ways[-1] == SIGNAL:
            code, said, took = stopped(process, rng.choice(stopping.SIGNALS))
            counts["most seconds to stop"] = max(counts["most seconds to stop"], took)
        elif ways[-1] == DISK:
            code, said = runs.ended(process)
            assert "Traceback" not in said and said.splitlines()[-1].startswith("train.py: "), said
        else:
            process.kill()
            code, said = runs.ended(process)
            assert code in (0, -signal.SIGKILL), said
        if newest and code != -signal.SIGKILL and "going on" in said:
            assert f"going on from step {newest}" in said
        newest, is_right = runs.restored(workdir, whole)
        counts["wrong states"] += not is_right
        counts["lost checkpoints"] += newest < saved
        happened = ways[-1] if ways[-1] in (SIGNAL, DISK) else MOMENT
        if code == -signal.SIGKILL and runs.unfinished(workdir) - before:
            happened = SAVE
        counts[happened if code else "done before"] += 1
        if code and happened in ways:
            ways.remove(happened)
        if code == 0:
            assert_whole(workdir, whole)
            workdir, newest = tmp_path / str(start + 1), 0
        if not ways:
            break
    compiled = {program(path) for path in tmp_path.rglob("*jit_train_step_*")} - {None}
    counts["different programs of the step"] = len(compiled) - 1
    figure("runs that were broken off", **counts)
    assert not ways and not counts["wrong states"] and not counts["lost checkpoints"]
    assert len(compiled) == 1
    if code != 0:
        said = runs.finish(config_file, workdir, DELETES)
        assert f"going on from step {newest}" in said or not newest
        assert_whole(workdir, whole)


def program(path):
    """A dumped program without the places of its source; None if a kill cut the dump off."""
    places = r' loc\((#\w+|"[^"]*"(\(#\w+\))?)\)|^#loc.*\n?'
    text = re.sub(places, "", path.read_text(), flags=re.MULTILINE)
    return text if text and text.count("{") == text.count("}") else None


def assert_whole(workdir, whole):
    assert runs.restored(workdir, whole) == (runs.STEPS, True)
    assert runs.rows(workdir) == runs.rows(whole)
    assert not runs.unfinished(workdir)


def wait_for(way, process, workdir, rng, seconds):
    """Waits until the moment to end the program, or until it has ended."""
    if way == DISK:
        return
    if way == SAVE:
        seen, saves = runs.unfinished(workdir), rng.randrange(1, 4)
        while saves and process.poll() is None:
            begun = runs.unfinished(workdir) - seen
            seen |= begun
            saves -= bool(begun)
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.1))
        return
    while way == SIGNAL and process.poll() is None and not hears(process, signal.SIGHUP):
        time.sleep(0.005)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=rng.uniform(0, seconds))


def hears(process, number):
    """The program has a handler for the signal."""
    status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
    caught = [line.split()[1] for line in status.splitlines() if line.startswith("SigCgt")]
    return bool(caught) and int(caught[0], 16) >> (number - 1) & 1


def stopped(process, number):
    """(exit status, messages, seconds to stop) of a program that gets a signal."""
    began, used = time.monotonic(), seconds_of_processors(process)
    others = resource.getrusage(resource.RUSAGE_CHILDREN)
    process.send_signal(number)
    code, said = runs.ended(process)
    took = time.monotonic() - began
    assert "Traceback" not in said, said
    if code != 0:
        assert code == stopping.EXIT_PREEMPTED, said
        assert said.count(f"stopped by {number.name}") == 1
        # On a busy machine the clock counts other programs too.
        all_used = resource.getrusage(resource.RUSAGE_CHILDREN)
        own = all_used.ru_utime + all_used.ru_stime - others.ru_utime - others.ru_stime - used
        took = min(took, own)
        assert took < SECONDS_TO_STOP, said
    return code, said, took


def seconds_of_processors(process):
    try:
        fields = pathlib.Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
