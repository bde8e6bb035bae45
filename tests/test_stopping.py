"""The first signal is a request; the second ends the process; ignored ones are ignored."""

import signal
import subprocess
import sys

import pytest

from moe_jax import stopping

PROGRAM = """
import signal
from moe_jax import stopping
seen = []
with stopping.requests(seen.append):
    signal.raise_signal(signal.SIGTERM)
    print(seen[0].name, flush=True)
    signal.raise_signal(signal.SIGHUP)
    print("not reached")
"""


def test_the_second_signal_ends_the_process_at_once(heard):
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (130, "SIGTERM\n")


@pytest.mark.parametrize("number", stopping.SIGNALS)
def test_without_a_signal_the_handlers_are_as_before(number, heard):
    def mine(*_):
        pass

    before = signal.signal(number, mine)
    try:
        with stopping.requests(lambda number: None):
            assert signal.getsignal(number) is not mine
        assert signal.getsignal(number) is mine
    finally:
        signal.signal(number, before)


LATE = """
import signal, sys
from moe_jax import stopping
class Falls:
    def __init__(self, kind):
        self.kind = kind
    def __del__(self):
        raise self.kind("of a callback")
with stopping.requests(print):
    sys.unraisablehook = lambda swallowed: print("hook", swallowed.exc_type.__name__)
    {signal}
    Falls(SystemExit)
    Falls(ValueError)
Falls(ValueError)
"""


@pytest.mark.parametrize(
    "signalled, said",
    [
        ("pass", ["hook SystemExit", "hook ValueError", "hook ValueError"]),
        ("signal.raise_signal(signal.SIGTERM)", ["15", "hook ValueError", "hook ValueError"]),
    ],
)
def test_errors_of_callbacks_reach_the_hook_that_a_library_needs_also_after_the_block(
    signalled, said, heard
):
    program = LATE.replace("{signal}", signalled)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout.splitlines(), done.stderr) == (said, "")


DONE = """
import signal
from moe_jax import stopping
with stopping.requests(print):
    stopping.over()
    signal.raise_signal(signal.SIGTERM)
    print("done", flush=True)
    signal.raise_signal(signal.SIGTERM)
    print("not reached")
"""


def test_a_signal_when_all_is_done_does_not_stop_the_end_and_a_second_one_does(heard):
    done = subprocess.run([sys.executable, "-c", DONE], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (130, "done\n")


def test_a_signal_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stopping.requests(lambda number: None):
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


ENDING = """
import atexit, signal, subprocess, sys
from moe_jax import stopping
atexit.register(lambda: print(signal.getsignal(signal.SIGINT).name))
with stopping.requests(print, until_exit=True):
    pass
for number in stopping.SIGNALS:
    signal.raise_signal(number)
asked = "import signal; print(signal.getsignal(signal.SIGTERM).name)"
print("at the end", subprocess.check_output([sys.executable, "-c", asked], text=True))
"""


def test_a_signal_while_a_program_ends_by_itself_does_not_spoil_its_status(heard):
    """And a program that it starts hears signals as ever."""
    done = subprocess.run([sys.executable, "-c", ENDING], capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()) == (0, ["at", "the", "end", "SIG_DFL", "SIG_IGN"])


SWALLOWED = """
import gc, signal, time
from moe_jax import stopping
def callback(*_):
    if not once:
        once.append(1)
        signal.raise_signal(signal.SIGINT)
        sum(range(10))
once = []
gc.callbacks.append(callback)
with stopping.requests(lambda number: stopping.end(75)):
    gc.collect()
    time.sleep(30)
"""


def test_an_end_that_a_callback_swallows_comes_again(heard):
    done = subprocess.run(
        [sys.executable, "-c", SWALLOWED], capture_output=True, text=True, timeout=20
    )
    assert (done.returncode, done.stderr) == (75, "")


BEFORE_AN_IMPORT = """
import signal, sys
from moe_jax import __main__ as entry
class Finder:
    def find_spec(name, *_):
        if name == "moe_jax.commands." + sys.argv[1]:
            try:
                [signal.raise_signal(number) for number in {numbers}]
            except BaseException as error:
                raise ImportError("an extension that is raised into can crash") from error
sys.meta_path.insert(0, Finder)
entry.run(sys.argv[1])
"""


@pytest.mark.parametrize(
    ("name", "status", "then"),
    [
        ("train", 75, "; run again to go on"),
        ("sweep", 75, "; run again to go on"),
        ("generate", 130, ""),
        ("upcycle", 130, ""),
    ],
)
def test_a_signal_while_a_command_is_imported_ends_it_on_the_spot(name, status, then, heard):
    for number in stopping.SIGNALS:
        program = BEFORE_AN_IMPORT.format(numbers=[int(number)])
        done = subprocess.run([sys.executable, "-c", program, name], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (status, f"-c: stopped by {number.name}{then}\n")


WORKING = """
import os, pathlib, signal, sys, time
from moe_jax import __main__ as entry, files
from moe_jax.commands import xla_flags
unlink = os.unlink
def slowly(*names, **how):
    time.sleep(0.6)
    unlink(*names, **how)
def main():
    with files.whole_folder(sys.argv[1]) as made:
        for name in "abc":
            (made / name).touch()
        os.unlink = slowly  # the removal takes longer than the end waits to be raised again
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            {last}
xla_flags.main = main
entry.run("xla_flags")
"""


@pytest.mark.parametrize(
    ("last", "status", "left"), [("pass", 130, 0), ("signal.raise_signal(signal.SIGHUP)", 130, 1)]
)
def test_a_signal_later_removes_what_was_begun_and_a_second_one_does_not_wait(
    last, status, left, heard, tmp_path
):
    program = [sys.executable, "-c", WORKING.format(last=last), str(tmp_path / "made")]
    done = subprocess.run(program, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (status, "-c: stopped by SIGTERM\n")
    assert len(list(tmp_path.iterdir())) == left


@pytest.mark.parametrize("end", [SystemExit(75), KeyboardInterrupt()], ids=repr)
def test_an_end_that_a_library_took_for_a_failure_is_raised_all_the_same(end):
    def of_library(way):
        try:
            raise end
        except BaseException as error:
            if way == "cause":
                raise ValueError("the file cannot be read") from error
            raise ValueError("the file cannot be read") from None

    for way in ("cause", "context"):
        with pytest.raises(ValueError) as raised:
            of_library(way)
        outer = RuntimeError("damaged")
        outer.__context__ = raised.value
        with pytest.raises(type(end)):
            stopping.pass_on(outer)
    stopping.pass_on(ValueError("the file is damaged"))
