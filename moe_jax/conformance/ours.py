"""Our balance rules against the vectors: values, gradients, and what must not change either.

A check takes the way of a train step: the router's row of the table, the statistics, the losses.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import config as configs
from moe_jax.conformance import vectors
from moe_jax.conformance.vectors import Rule, Vectors
from moe_jax.model import router, routing
from moe_jax.model.router_row import Inputs
from moe_jax.training import balance
from moe_jax.training.state import Measures, RouterState

LIMIT = 1e-4  # relative to the largest expected number, which float32 keeps to about 5e-6
DEVICES = 4  # for a rule that does not say how many
MICROBATCHES = 2

# By check, the largest error relative to the largest expected number; None for no such check.
Differences = Mapping[str, float | None]


@dataclasses.dataclass(frozen=True)
class Way:
    """How a loss is computed; none of this may change it."""

    devices: int = 1
    microbatches: int = 1
    padding: int = 0  # columns at the end of each row, and rows
    remat: bool = False


def differences(rule: Rule, data: Vectors) -> Differences:
    """The largest relative error of value and gradient for each check of a rule."""
    ways = {
        "plain": Way(),
        "devices": Way(devices=DEVICES if rule.devices == 1 else rule.devices),
        "microbatches": Way(microbatches=MICROBATCHES),
        "padding": Way(padding=2),
        "remat": Way(remat=True),
    }
    if rule.devices > 1:  # a mean over the microbatches of each device is another loss
        del ways["microbatches"]
    if jax.device_count() < ways["devices"].devices:
        del ways["devices"]
    found = {}
    for name, way in ways.items():
        loss, gradient_LBTE = evaluated(rule, data, way)
        added = zip(gradient_LBTE.shape, rule.gradient_LBTE.shape, strict=True)
        expected_LBTE = np.pad(rule.gradient_LBTE, [(0, n - m) for n, m in added])
        found[name] = max(_difference(loss, rule.loss), _difference(gradient_LBTE, expected_LBTE))
    return {name: found.get(name) for name in CHECKS}


CHECKS = ("plain", "devices", "microbatches", "padding", "remat")


def _difference(found, expected) -> float:
    expected = np.asarray(expected)
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def evaluated(rule: Rule, data: Vectors, way: Way) -> tuple[float, np.ndarray]:
    """The loss and its gradient with respect to the logits, padding included."""
    more = (0, way.padding * (rule.devices == 1) * DEVICES), (0, way.padding)
    logits_LBTE = np.pad(data.logits_LBTE, ((0, 0), *more, (0, 0)), constant_values=5.0)
    mask_BT = np.pad(data.mask_BT, more)
    logits_LBTE[:, ~mask_BT, 0] += 4.0  # padding favours the first expert
    total = functools.partial(_loss, rule, way)
    loss, slope_LBTE = jax.jit(jax.value_and_grad(total))(jnp.float32(logits_LBTE), mask_BT)
    return float(loss), np.asarray(slope_LBTE)


def _loss(rule: Rule, way: Way, logits_LBTE: jax.Array, mask_BT: jax.Array) -> jax.Array:
    losses = functools.partial(
        balance.router_losses,
        num_experts_per_tok=rule.model.num_experts_per_tok,
        num_tokens=jnp.sum(mask_BT),
        coefficients_L=None if rule.coefficients_L is None else jnp.array(rule.coefficients_L),
    )
    plain: Callable = functools.partial(_stats, rule, way.devices)
    stats_of = jax.checkpoint(plain) if way.remat else plain
    if way.microbatches == 1:
        return losses(stats_of(logits_LBTE, mask_BT), rule.balance)[0]
    n = way.microbatches
    parts = [stats_of(logits_LBTE[:, i::n], mask_BT[i::n]) for i in range(n)]
    if rule.balance.load_balancing_over == "sequence":
        shares = (losses(stats, rule.balance, accumulation_steps=n)[0] for stats in parts)
        return sum(shares, jnp.zeros(()))
    window = dataclasses.replace(rule.balance, load_balancing_over="window")
    of_all = functools.partial(losses, balance=window, accumulation_steps=n)
    (value, _), slope = balance.slope(of_all, jax.tree.map(lambda *x: sum(x), *parts))
    linear = sum((balance.along(slope, stats) for stats in parts), jnp.zeros(()))
    return jax.lax.stop_gradient(value - linear) + linear  # its gradient is that of the step


def _stats(rule: Rule, devices: int, logits_LBTE: jax.Array, mask_BT: jax.Array):
    """The statistics [L, groups, ...] of the rows; with several devices each has its own rows."""
    config, row = rule.model, router.ROUTERS[rule.model.router]
    by_row = balance.counted(rule.balance).by_row

    def of_layer(mask_BT, logits_BTE):
        logits_ME = logits_BTE.reshape(-1, config.num_experts)
        leaves = {"bias": jnp.zeros(config.num_experts)}
        inputs = Inputs(logits_ME, routing.Groups(mask_BT.ravel()), leaves)
        chosen = row.route(logits_ME, inputs, **row.values(config))
        return routing.grouped_statistics(chosen, mask_BT, by_row)

    def of_device(logits_LBTE, mask_BT):
        return jax.vmap(functools.partial(of_layer, mask_BT))(logits_LBTE)

    if devices == 1:  # the shards of a rule that has some are parts of one array
        parts = zip(
            jnp.split(logits_LBTE, rule.devices, axis=1),
            jnp.split(mask_BT, rule.devices),
            strict=True,
        )
        of_parts = [of_device(*part) for part in parts]
        return jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *of_parts)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:devices]), ("rows",))
    on_rows = jax.P(None, "rows"), jax.P("rows")
    return jax.shard_map(of_device, mesh=mesh, in_specs=on_rows, out_specs=jax.P(None, "rows"))(
        logits_LBTE, mask_BT
    )


def updates(data: Vectors) -> dict[str, tuple[float, float]]:
    """By rule outside the gradient, the largest error and its limit."""
    stored = data.updates
    load_LE, bias_LE = jnp.array([stored["load"]]), jnp.float32([stored["bias"]])
    loads = {"tokens_per_expert_E": load_LE, "num_dropped": jnp.zeros(1, int)}
    counts_LEH = _counts(stored["quantile_logits"], bias_LE[0])[None]
    measures = Measures(loss=jnp.zeros(()), router=loads, shortfall_LEH=counts_LEH)
    alpha = RouterState(jnp.float32([stored["coefficient"]]))
    found: dict[str, tuple[Any, str]] = {
        "bias_update": (_biases(bias_LE, measures, bias_update_rate=stored["rate"]), "bias_after"),
        "quantile_update": (_biases(bias_LE, measures, bias_update="quantile"), "quantile_after"),
        "adaptive_update": (
            balance.adapted({}, alpha, _run(load_balancing_schedule="adaptive"), measures)[
                1
            ].coefficients_L,
            "coefficient_after",
        ),
    }
    limits = {"quantile_update": float(routing.bin_width(bias_LE)[0, 0])}
    return {
        name: (float(np.abs(np.ravel(new) - stored[key]).max()), limits.get(name, 1e-7))
        for name, (new, key) in found.items()
    }


def _counts(logits_ME, bias_E) -> jax.Array:
    """The histogram of a batch in four parts, as four devices or microbatches sum it."""
    config = _run().model
    of_part: Callable = functools.partial(
        router.shortfall, num_experts_per_tok=config.num_experts_per_tok
    )
    valid_M = jnp.ones(len(logits_ME) // 4, bool)
    return sum(
        routing.shortfall_histogram(of_part(part_ME, bias_E), bias_E, valid_M)
        for part_ME in jnp.split(jnp.float32(logits_ME), 4)
    )


def _run(**keys) -> configs.Run:
    config = vectors.mixture(4, router="sigmoid_topk", capacity_factor=1.0)
    return configs.Run(model=config, balance=configs.Balance(**keys))


def _biases(bias_LE: jax.Array, measures: Measures, **keys) -> np.ndarray:
    params = {"blocks": {"0": {"moe": {"router": {"bias": bias_LE}}}}}
    run = _run(**keys)
    params, _ = balance.with_updated_biases(params, RouterState(), run, measures)
    if run.balance.bias_update == "quantile":
        params, _ = balance.with_quantile_biases(params, RouterState(), run, measures)
    return np.asarray(params["blocks"]["0"]["moe"]["router"]["bias"][0])
