"""Expert parallelism: three modes in which tokens reach experts that lie on other devices.

Each function works on one device inside `jax.shard_map` (or alone), on the M tokens of that device,
with the experts sharded along the mesh's expert axis of X devices. If experts are also sharded
along edp, the devices along that axis hold the same tokens; each computes its own experts'
contribution, and these are summed.

  fsdp        Every device all-gathers the weights of all experts of its position along edp; tokens
              stay where they are. This moves 3DF values per expert, whatever the number of tokens.
  ring        Every device all-gathers the tokens of the X devices and computes its own experts'
              contribution to each; a reduce-scatter returns the sums to the tokens' devices.
  all_to_all  Each token goes to the devices that hold its experts, and the results return: by a
              ragged all-to-all if dropless, by one of fixed shapes with a capacity.
"""

import jax
import jax.numpy as jnp

from moe_jax.model import experts as ffn
from moe_jax.model import remat
from moe_jax.model.routing import Groups, Routing
from moe_jax.ops import implementations, permute
from moe_jax.parallel import sharding

AXIS = "expert"
# The axes along which the experts' weights stay sharded while they are used.
KEPT = {
    "fsdp": sharding.TENSOR,
    "ring": (*sharding.TENSOR, AXIS),
    "all_to_all": (*sharding.TENSOR, AXIS),
}


def fsdp(x_MD, routing, groups, experts, config):
    """All experts of this position along edp are on this device.

    Returns [M, D] and the number of dropped assignments.
    """
    index_MA = _own(routing, groups, experts["up"].shape[0], config)
    plan, num_dropped = _plan(index_MA, groups, experts["up"].shape[0], config)
    x_RD, weight_R = _dispatched(x_MD, routing.weight_MA, plan)
    with jax.named_scope("experts"):
        sizes_E = plan.group_sizes_E if plan.complete else None
        y_RD = ffn.experts_of_rows(x_RD, weight_R, experts, sizes_E, config)
    with jax.named_scope("combine"):
        return permute.combine(y_RD, plan), num_dropped


def ring(x_MD, routing, groups, experts, config):
    """All-gathers tokens, runs this device's experts, reduce-scatters the sums. Dropless."""
    E = experts["up"].shape[0]
    index_MA = _own(routing, groups, E * jax.lax.axis_size(AXIS), config)
    with jax.named_scope("dispatch"):
        x_ND, index_NA, weight_NA = (
            jax.lax.all_gather(x, AXIS, tiled=True) for x in (x_MD, index_MA, routing.weight_MA)
        )
        own_NA = index_NA - jax.lax.axis_index(AXIS) * E
        own_NA = jnp.where((own_NA >= 0) & (own_NA < E), own_NA, E)  # E: on another device
        plan = remat.named("plan", permute.sort_by_expert(own_NA, E + 1))
        x_RD, weight_R = _dispatched(x_ND, weight_NA, plan)
    with jax.named_scope("experts"):
        y_RD = ffn.experts_of_rows(x_RD, weight_R, experts, plan.group_sizes_E[:-1], config)
    with jax.named_scope("combine"):
        y_ND = permute.combine(y_RD, plan)
        y_MD = jax.lax.psum_scatter(y_ND, AXIS, tiled=True)
    return y_MD, jnp.zeros((), jnp.int32)


def all_to_all(x_MD, routing, groups, experts, config):
    """Sends rows to the devices that hold their experts, and the results back."""
    E = experts["up"].shape[0] * jax.lax.axis_size(AXIS)
    index_MA = _own(routing, groups, E, config)
    plan, num_dropped = _plan(index_MA, groups, E, config)
    x_RD, weight_R = _dispatched(x_MD, routing.weight_MA, plan)
    y_RD = (_ragged if plan.complete else _equal)(x_RD, weight_R, experts, config, plan)
    with jax.named_scope("combine"):
        return permute.combine(y_RD, plan), num_dropped


MODES = {"fsdp": fsdp, "ring": ring, "all_to_all": all_to_all}


def _own(routing: Routing, groups: Groups, E: int, config) -> jax.Array:
    """Indices into the E experts of this device's position along edp, [M, A].

    E stands for the experts of other positions and, in a dropless layer, for the expert of padding.
    """
    index_MA = routing.expert_index_MA
    if config.dispatch == "dropless":
        index_MA = jnp.where(groups.valid_M[:, None], index_MA, config.num_experts)
    if E == config.num_experts:
        return index_MA
    own_MA = index_MA - jax.lax.axis_index("edp") * E
    return jnp.where((own_MA >= 0) & (own_MA < E), own_MA, E)


def _plan(expert_index_MA, groups: Groups, E, config) -> tuple[permute.Permutation, jax.Array]:
    with jax.named_scope("dispatch"):
        if config.dispatch == "dropless":
            plan = permute.sort_by_expert(expert_index_MA, E)
            return remat.named("plan", plan), jnp.zeros((), jnp.int32)
        sizes = config.num_experts, config.capacity_factor, config.min_capacity
        C, limit_G = groups.slots(config.num_experts_per_tok, *sizes)
        plan = permute.fill_slots(expert_index_MA, groups.valid_M, E, C, limit_G, groups.key)
        plan = remat.named("plan", plan)
        chosen_MA = (expert_index_MA < E) & groups.valid_M[:, None]
        num_dropped = jnp.sum(chosen_MA) - jnp.sum(plan.group_sizes_E)
        return plan, num_dropped if E == config.num_experts else jax.lax.psum(num_dropped, "edp")


def _dispatched(x_MD, weight_MA, plan):
    with jax.named_scope("dispatch"):
        return permute.dispatch(x_MD, plan), permute.dispatch_weight(weight_MA, plan)


def _equal(x_RD, weight_R, experts, config, plan):
    """An all-to-all of fixed shapes: each device sends C slots to each expert."""
    E, X = experts["up"].shape[0], jax.lax.axis_size(AXIS)

    def to_experts(x):  # [X·E·C, …] by device and expert, to [E, X, C, …] by expert and source
        x = jax.lax.all_to_all(x.reshape(X, E, -1, *x.shape[1:]), AXIS, 0, 0)
        return x.swapaxes(0, 1)

    with jax.named_scope("exchange"):
        there_D, there = to_experts(x_RD), to_experts(weight_R)
    with jax.named_scope("experts"):
        y = ffn.experts_of_rows(
            there_D.reshape(-1, x_RD.shape[1]), there.ravel(), experts, None, config
        )
    with jax.named_scope("exchange"):
        y = y.reshape(there_D.shape).swapaxes(0, 1)
        return jax.lax.all_to_all(y, AXIS, 0, 0).reshape(x_RD.shape)


def _ragged(x_RD, weight_R, experts, config, plan):
    """Sends each device exactly the rows that chose its experts, and drops none.

    The buffers have room for the worst case, in which one device receives all rows of all devices.
    """
    E, X, me = experts["up"].shape[0], jax.lax.axis_size(AXIS), jax.lax.axis_index(AXIS)
    with jax.named_scope("exchange"):
        # [source, destination, expert of the destination]
        sizes_XYE = jax.lax.all_gather(plan.group_sizes_E, AXIS).reshape(X, X, E)
        sizes_XY = sizes_XYE.sum(axis=2)
        to = Exchange(sizes_XY, me)
        x_SD = to.rows(x_RD, X * len(x_RD))
        weight_S = to.rows(weight_R[:, None], X * len(x_RD))[:, 0]
        # The rows arrive sorted by source, then by expert; the rest of the buffer is padding.
        ends = jnp.cumsum(sizes_XYE[:, me].ravel())
        place_S = jnp.searchsorted(ends, jnp.arange(len(x_SD)), side="right")
        expert_S = jnp.where(place_S < X * E, place_S % E, E)
        by_expert = permute.sort_by_expert(expert_S[:, None], E + 1)
        x_SD, weight_S = _dispatched(x_SD, weight_S[:, None], by_expert)
    with jax.named_scope("experts"):
        y_SD = ffn.experts_of_rows(x_SD, weight_S, experts, by_expert.group_sizes_E[:-1], config)
    with jax.named_scope("exchange"):
        y_SD = permute.combine(y_SD, by_expert)
        return Exchange(sizes_XY.T, me).rows(y_SD, len(x_RD))


class Exchange:
    """The sizes and buffer offsets of the rows that devices X send to devices Y.

    A device's rows lie in the order of their destinations, and arrive in the order of their
    sources.
    """

    def __init__(self, sizes_XY: jax.Array, me: jax.Array):
        """`sizes_XY`: how many rows each source X sends to each destination Y."""
        self.sizes_XY, self.me = sizes_XY, me
        self.input_offsets_XY = jnp.cumsum(sizes_XY, axis=1) - sizes_XY
        self.output_offsets_XY = jnp.cumsum(sizes_XY, axis=0) - sizes_XY

    def rows(self, x_RD: jax.Array, room: int) -> jax.Array:
        """[room, D]: the rows received, followed by zeros."""
        if implementations.platform() == "cpu":
            return self._emulated(x_RD, room)
        return jax.lax.ragged_all_to_all(
            x_RD,
            jnp.zeros((room, x_RD.shape[1]), x_RD.dtype),
            self.input_offsets_XY[self.me],
            self.sizes_XY[self.me],
            self.output_offsets_XY[self.me],
            self.sizes_XY[:, self.me],
            axis_name=AXIS,
        )

    def _emulated(self, x_RD, room):
        """All-gathers and picks this device's rows: XLA:CPU has no ragged all-to-all."""
        x_XRD = jax.lax.all_gather(x_RD, AXIS)
        begin_X = self.output_offsets_XY[:, self.me]
        size_X = self.sizes_XY[:, self.me]
        row_S = jnp.arange(room)
        source_S = jnp.searchsorted(begin_X + size_X, row_S, side="right")
        came_S = source_S < len(size_X)
        source_S = jnp.minimum(source_S, len(size_X) - 1)
        at_S = row_S - begin_X[source_S] + self.input_offsets_XY[source_S, self.me]
        return jnp.where(came_S[:, None], x_XRD[source_S, at_S], 0)
