"""Guards against training that goes wrong: spikes of the loss, and routers that collapse."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import struct

from moe_jax import config as configs
from moe_jax.parallel import distributed

# Spikes --------------------------------------------------------------------------------------

MOST_REWINDS = 3


@struct.dataclass
class History:
    """Losses and gradient norms of the last W steps, [W] each; NaN for a step that is not there."""

    losses_W: jax.Array
    gradient_norms_W: jax.Array


def history(guards: configs.Guards) -> History | None:
    """The history before the first step; None if spikes are not looked for."""
    if not guards.spike_sigma:
        return None
    return History(*(jnp.full((guards.spike_window,), jnp.nan) for _ in range(2)))


def is_spike(before: History, loss: jax.Array, norm: jax.Array, sigma: float) -> jax.Array:
    """True if the loss or the gradient norm is more than `sigma` standard deviations above its mean
    over the history, once that is half full: the rule of OLMo-core's SkipStepOptimizer.

    Steps that were not finite are left out, because a NaN would make every later comparison false.
    """
    pairs = ((before.losses_W, loss), (before.gradient_norms_W, norm))
    return jnp.logical_or(*(_is_above(past_W, value, sigma) for past_W, value in pairs))


def _is_above(past_W: jax.Array, value: jax.Array, sigma: float) -> jax.Array:
    enough = jnp.isfinite(past_W).sum() >= max(2, len(past_W) // 2)
    limit = jnp.nanmean(past_W) + sigma * jnp.nanstd(past_W, ddof=1)
    return enough & (value > limit)


def noted(before: History, step: jax.Array, loss: jax.Array, norm: jax.Array) -> History:
    """The history with this step. A spike is noted too, so that a lasting change of level is not
    taken for spikes for ever."""
    i = step % len(before.losses_W)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    loss, norm = (jnp.where(finite, x, jnp.nan) for x in (loss, norm))
    return History(before.losses_W.at[i].set(loss), before.gradient_norms_W.at[i].set(norm))


class Rewind(Exception):
    """Asks to go back to the newest checkpoint, and to leave out the batches from there to `batch`,
    the one of the spike at `step`."""

    def __init__(self, step: int, batch: int):
        super().__init__(
            f"step {step} is a spike again: the run goes back to its newest checkpoint and leaves "
            f"out the batches to {batch}"
        )
        self.batch = batch


# Alarms --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Alarm:
    """`found` maps the router measures of a row to what is wrong with the worst layer, or ""."""

    found: Callable[[Mapping[str, Sequence], configs.Run], str]
    advice: str


def _worst(values: Sequence[float], choose: Callable = max) -> tuple[int, float]:
    worst = choose(range(len(values)), key=lambda layer: values[layer])
    return worst, values[worst]


def _dead_experts(measures: Mapping[str, Sequence], run: configs.Run) -> str:
    layer, dead = _worst(measures["dead_experts"])
    total = run.model.num_experts
    little = "have less than 1 % of the even load"
    return f"{dead} of {total} experts of sparse layer {layer} {little}" if dead else ""


def _collapse(measures: Mapping[str, Sequence], run: configs.Run) -> str:
    layer, effective = _worst(measures["effective_experts"], min)
    E, k = run.model.num_experts, run.model.num_experts_per_tok
    collapsed = effective < k + run.guards.collapse_share * (E - k)
    return f"sparse layer {layer} uses {effective:.1f} of {E} experts" if collapsed else ""


def _max_violation(measures: Mapping[str, Sequence], run: configs.Run) -> str:
    layer, violation = _worst(measures["max_violation"])
    limit = run.guards.max_violation
    above = limit and violation > limit
    return f"the largest load of sparse layer {layer} is {violation + 1:.1f} means" if above else ""


BALANCE = "raise config.balance.load_balancing_coefficient, or set balance.bias_update_rate"
ALARMS: dict[str, Alarm] = {
    "dead experts": Alarm(_dead_experts, BALANCE),
    "router collapse": Alarm(_collapse, BALANCE),
    "max violation": Alarm(_max_violation, BALANCE),
}


class Alarms:
    """Says when something has been wrong in `guards.alarm_rows` rows in a row, and when it ends."""

    def __init__(self, run: configs.Run):
        self._run = run
        self._in_a_row = dict.fromkeys(ALARMS, 0)

    def see(self, row: Mapping) -> None:
        """Looks at a row of metrics.jsonl."""
        limit = self._run.guards.alarm_rows
        if not limit or "router" not in row:
            return
        for name, alarm in ALARMS.items():
            found, before = alarm.found(row["router"], self._run), self._in_a_row[name]
            self._in_a_row[name] = before + 1 if found else 0
            if self._in_a_row[name] == limit:
                rows = f"{limit} rows in a row" if limit > 1 else "this row"
                distributed.say(f"step {row['step']}: {name} in {rows}: {found}", alarm.advice)
            if not found and before >= limit:
                distributed.say(f"step {row['step']}: no more {name}")
