"""The step loop moves nothing between host and device but what it says it moves."""

import dataclasses
import pathlib
import signal
import types

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import config as configs
from moe_jax import stopping
from moe_jax.evaluation.evaluators import Scheduled
from moe_jax.model import PRESETS
from moe_jax.training import flops, loop, pulse
from moe_jax.training.state import Measures


def test_a_step_with_an_implicit_transfer_is_refused():
    host_array = np.ones(3, np.float32)
    parts = parts_of(lambda state, batch: (state + host_array, None))
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        loop.run(jnp.zeros(3), 0, iter([None]), settings_of(1), parts)


def settings_of(num_steps):
    training = configs.Training(num_steps=num_steps)
    return configs.Run(model=PRESETS["quickstart"], training=training)


def parts_of(train_step, saved=None, workdir=pathlib.Path("not there")):
    return loop.Parts(
        train_step=train_step,
        evaluators={},
        save=lambda step, state, skipped: None if saved is None else saved.append((step, skipped)),
        saved=lambda wait: None,
        write=lambda row: None,
        costs=flops.Costs(1, 1.0, 1.0, 1.0),
        batch_of=lambda step: step - 1,
        largest=lambda number: number,
        pulse=pulse.Pulse(configs.Guards(), workdir),
    )


def test_a_signal_between_the_request_and_its_exchange_is_not_lost(heard):
    sent, saved = [], []

    def largest(number):  # of all processes, before the signal
        if not sent:
            sent.append(signal.raise_signal(signal.SIGTERM))
        return number

    step = step_with(iter([""] * 4))
    parts = dataclasses.replace(parts_of(step, saved), largest=largest)
    with pytest.raises(SystemExit) as ended:
        loop.run(jnp.zeros(3), 0, iter([None] * 4), settings_of(4), parts)
    assert ended.value.code == 75 and saved == [(1, 0)]


def step_with(outcomes):
    """A step that is skipped or diverges as the outcome says."""
    zero, flag = jnp.zeros(()), {True: jnp.bool(True), False: jnp.bool(False)}

    def train_step(state, batch):
        outcome = next(outcomes)
        flags = {name: flag[outcome == name] for name in ("skipped", "spiked", "diverged")}
        flags["skipped"] |= flags["spiked"]
        return state, Measures(zero, gradient_norm=zero, learning_rate=zero, **flags)

    return train_step


def test_every_skipped_step_is_said_counted_and_in_the_checkpoint(capsys):
    saved, outcomes = [], iter(["", "skipped", "", "skipped"])
    parts = parts_of(step_with(outcomes), saved)
    _, results = loop.run(jnp.zeros(3), 0, iter([None] * 4), settings_of(4), parts, skipped=5)
    assert results["skipped_steps"] == 7 and saved == [(4, 7)]
    said = capsys.readouterr().err
    assert "step 2: loss or gradient not finite, no update was made (6 in this run)" in said
    assert "step 4: " in said and "step 3: " not in said


def test_parameters_that_are_not_finite_end_the_run_and_are_not_saved(capsys):
    saved, outcomes = [], iter(["", "diverged"])
    parts = parts_of(step_with(outcomes), saved)
    with pytest.raises(SystemExit) as ended:
        loop.run(jnp.zeros(3), 0, iter([None] * 2), settings_of(2), parts)
    assert ended.value.code == 3 and not saved
    assert "update of step 2 made parameters that are not finite" in capsys.readouterr().err


@pytest.mark.parametrize(("seconds", "is_slow"), [(0.1, False), (9.0, True)])
def test_data_that_a_step_waits_for_is_named_once(seconds, is_slow, capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(loop, "time", types.SimpleNamespace(monotonic=lambda: clock[0]))

    def batches():
        while True:
            clock[0] += seconds
            yield None

    step = step_with(iter([""] * 30))

    def train_step(state, batch):
        clock[0] += 1
        return step(state, batch)

    loop.run(jnp.zeros(3), 0, batches(), settings_of(30), parts_of(train_step))
    said = capsys.readouterr().err
    assert said.count("of the time is spent waiting for batches; put") == is_slow
    # Read after step 11: ten waits, as the first batch keeps no step waiting, in 11 x (9 + 1) s.
    assert ("step 10: 82% of the time" in said) == is_slow


@pytest.mark.parametrize("number", stopping.SIGNALS)
def test_a_signal_in_an_evaluation_saves_and_ends_it(number, capsys, heard):
    saved, evaluated = [], []

    def evaluate(params):
        evaluated.append("begun")
        signal.raise_signal(number)
        evaluated.append("ended")

    parts = dataclasses.replace(
        parts_of(step_with(iter([""] * 4)), saved),
        evaluators={"slow": Scheduled(evaluate, every=3, logged_at_end=False)},
    )
    state = types.SimpleNamespace(params=None)
    with pytest.raises(SystemExit) as ended:
        loop.run(state, 1, iter([None] * 4), settings_of(4), parts)
    assert (ended.value.code, saved, evaluated) == (75, [(3, 0)], ["begun"])
    assert f"stopped by {number.name} at step 3; saved" in capsys.readouterr().err
