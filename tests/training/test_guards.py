"""Spikes are found by their distance from the recent mean, and routers that go wrong are named."""

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import config as configs
from moe_jax.model import PRESETS
from moe_jax.training import guards

NAN = float("nan")


def after(values, window=8):
    """The history after steps with these losses, and gradient norms that are twice as large."""
    settings = configs.Guards(spike_sigma=6.0, spike_window=window)
    history = guards.history(settings)
    for step, value in enumerate(values):
        history = guards.noted(history, step, jnp.float32(value), jnp.float32(2 * value))
    return history


def spike(history, loss=1.0, norm=2.0, sigma=6.0):
    return bool(guards.is_spike(history, jnp.float32(loss), jnp.float32(norm), sigma))


def test_a_spike_is_more_than_sigma_deviations_above_the_mean():
    losses = [0.9, 1.1, 1.0, 1.2, 0.8, 1.0]
    limit = np.mean(losses) + 6 * np.std(losses, ddof=1)
    assert not spike(after(losses), loss=limit - 0.01)
    assert spike(after(losses), loss=limit + 0.01)
    assert spike(after(losses), norm=2 * limit + 0.01)
    assert not spike(after(losses), norm=2 * limit - 0.01) and not spike(after(losses), loss=-9)
    assert not spike(after(losses), loss=limit + 0.01, sigma=7.0)


def test_there_are_no_spikes_before_half_of_the_window_is_known():
    assert not spike(after([1.0, 1.1, 0.9]), loss=100)
    assert spike(after([1.0, 1.1, 0.9, 1.0]), loss=100)
    assert not spike(after([1.0, NAN, 1.1, 0.9]), loss=100)


def test_a_step_that_was_not_finite_does_not_blind_the_guard():
    history = after([1.0, 1.1, NAN, 0.9, float("inf"), 1.0])
    assert not spike(history) and spike(history, loss=100)


def test_only_the_last_steps_count_so_that_a_new_level_is_accepted():
    before = after([1.0, 1.1, 0.9, 1.0, 1.1, 0.9, 1.0, 1.1])
    assert spike(before, loss=3.0)
    moved = after([1.0, 1.1, 0.9, 1.0, 1.1, 0.9, 1.0, 1.1] + [3.0, 3.1] * 4)
    assert not spike(moved, loss=3.0, norm=6.0)


def test_without_sigma_there_is_no_history():
    assert guards.history(configs.Guards()) is None


def alarms_of(**settings):
    run = configs.Run(model=PRESETS["quickstart-8e"], guards=configs.Guards(**settings))
    return guards.Alarms(run), run.model


HEALTHY = {"dead_experts": [0, 0], "effective_experts": [8.0, 7.5], "max_violation": [0.2, 0.5]}


@pytest.mark.parametrize(
    ("measures", "name", "shown"),
    [
        ({"dead_experts": [0, 3]}, "dead experts", "3 of 8 experts of sparse layer 1"),
        ({"effective_experts": [8.0, 2.1]}, "router collapse", "layer 1 uses 2.1 of 8 experts"),
        ({"max_violation": [2.5, 0.1]}, "max violation", "sparse layer 0 is 3.5 means"),
    ],
)
def test_what_lasts_is_said_once_and_its_end_too(measures, name, shown, capsys):
    alarms, _ = alarms_of(alarm_rows=2, max_violation=2.0)
    bad, good = HEALTHY | measures, HEALTHY
    for step, values in enumerate([good, bad, good, bad, bad, bad, good, good]):
        alarms.see({"step": step, "router": values})
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith(f"step 4: {name} in 2 rows in a row: ") and shown in first
    assert "raise config.balance.load_balancing_coefficient" in first
    assert last == f"step 6: no more {name}"


def test_alarms_can_be_turned_off_and_do_not_sound_in_health(capsys):
    for settings, values in (({"alarm_rows": 0}, {"dead_experts": [8]}), ({"alarm_rows": 1}, {})):
        alarms, _ = alarms_of(**settings)
        for step in range(5):
            alarms.see({"step": step, "router": HEALTHY | values})
            alarms.see({"step": step})  # of a dense model
    assert capsys.readouterr().err == ""
