"""The transformer: thin Linen modules name and create the parameters, pure functions compute."""

import functools
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from moe_jax import tree
from moe_jax.model import attention, layers, moe, remat
from moe_jax.model.config import DENSE, MOE, BlockKind, ModelConfig
from moe_jax.model.initialisation import INITIALIZERS
from moe_jax.model.layout import LayerGroup, layer_groups, rows_of_stacks
from moe_jax.model.router import ROUTERS
from moe_jax.model.routing import BY_SHARD, Counted, RouterStats
from moe_jax.ops import host_memory, implementations
from moe_jax.parallel import sharding


@struct.dataclass
class Output:
    """`router` is None for a dense model; its fields are described at `RouterStats`."""

    logits_BTV: jax.Array
    router: RouterStats | None


@struct.dataclass
class Shared:
    """The values that are the same for all layers: arrays, and the statistics to count."""

    positions_BT: jax.Array
    segment_ids_BT: jax.Array  # 0 is padding
    key: jax.Array | None = None  # for the random parts of training; None in evaluation
    counted: Counted = struct.field(pytree_node=False, default=BY_SHARD)


@struct.dataclass
class BlockOutput:
    """A block's results besides x; a dense block has no statistics, and training has no cache."""

    stats: RouterStats | None
    cache: dict | None
    tapped: dict[str, jax.Array] = struct.field(default_factory=dict)


class Parameters(nn.Module):
    """Creates the arrays of a nested table name -> shape: scales are 1, biases 0, others random.

    Random values are drawn in the order of the axes, so a small stack of experts equals the first
    rows of a larger one.
    """

    shapes: Mapping
    config: ModelConfig

    @nn.compact
    def __call__(self) -> dict:
        return {
            name: Parameters(entry, self.config, name=name)()
            if isinstance(entry, Mapping)
            else self.param(name, self._initializer(name), entry)
            for name, entry in self.shapes.items()
        }

    def _initializer(self, name):
        if name == "scale" and self.config.norm != "layer_1p":
            return nn.initializers.ones
        is_router = self.path[-2:] == ("moe", "router")
        of_router = ROUTERS[self.config.router].leaves if is_router else {}
        if of_router[name].zero if name in of_router else name in ("scale", *BIASES):
            return nn.initializers.zeros
        row, config = INITIALIZERS[self.config.initializer], self.config
        deviation = row.deviation(name, config.initializer_range, config.num_hidden_layers)
        if is_router or name == "kernel":  # drawn expert by expert, so a column is independent of E
            return lambda key, shape: deviation * row.draw(key, shape[::-1]).T
        return lambda key, shape: deviation * row.draw(key, shape)


BIASES = ("bias", "bq", "bk", "bv", "bo", "gate_bias", "up_bias", "down_bias")


def block(
    x_BTD: jax.Array,
    params: dict,
    per_layer: Mapping,
    shared: Shared,
    *,
    config: ModelConfig,
    kind: BlockKind,
    return_routing: bool = False,
    taps: tuple[str, ...] = (),
) -> tuple[jax.Array, "BlockOutput"]:
    """x + attention(x), then x + feed-forward(x).

    Args:
      params: the parameters of one layer, as `layout.layer` gives them.
      per_layer: the layer's `index` and, in decoding, the `cache` of keys and values.
      taps: names of intermediate values to return as well: "feed_forward_input" is the normalised
        input of the feed-forward, [B, T, D].
    """
    with jax.named_scope("attention"):
        y_BTD, cache = attention.attention(
            *(x_BTD, params["attention"], shared.positions_BT, shared.segment_ids_BT, config),
            window=kind.window,
            cache=per_layer.get("cache"),
        )
    x_BTD = remat.named("middle", sharding.constrain_batch(x_BTD + y_BTD))
    tapped = {}
    if "feed_forward_input" in taps:
        feed_forward = params["mlp" if kind.feed_forward == DENSE else "moe"]
        tapped["feed_forward_input"] = layers.norm(x_BTD, feed_forward["norm"], config)
    if kind.feed_forward == DENSE:
        with jax.named_scope("mlp"):
            y_BTD, stats = layers.mlp(x_BTD, params["mlp"], config), None
    else:
        # With a fixed key, evaluation always drops the same tokens, even if drawn at random.
        key = jax.random.key(0) if shared.key is None else shared.key
        with jax.named_scope("moe"):
            y_BTD, stats = moe.moe(
                *(x_BTD, params["moe"], shared.segment_ids_BT > 0, config),
                key=jax.random.fold_in(key, per_layer["index"]),
                training=shared.key is not None,
                counted=shared.counted,
                return_routing=return_routing,
            )
    return sharding.constrain_batch(x_BTD + y_BTD), BlockOutput(stats, cache, tapped)


def shell_shapes(config: ModelConfig) -> dict:
    V, D = config.vocab_size, config.hidden_size
    shapes = {"embed": {"tokens": (V, D)}, "final_norm": layers.norm_shapes(config)}
    if config.position_embedding == "learned":
        shapes["embed"]["positions"] = (config.max_position_embeddings, D)
    return shapes if config.tie_word_embeddings else {**shapes, "unembed": (D, V)}


def init(config: ModelConfig, key: jax.Array) -> dict:
    """Random float32 parameters in the tree that all families share, with block leaves stacked.

    Keys are folded in by name and layer index, so a layer's parameters depend neither on the mesh
    nor on the other layers, and an expert's parameters do not depend on the number of experts.
    """
    key_shell, key_blocks = (tree.fold_in(key, name) for name in ("shell", "blocks"))

    def layer_params(kind, layer):
        shapes = {"attention": attention.shapes(config)}
        if kind.feed_forward == DENSE:
            shapes["mlp"] = layers.mlp_shapes(config)
        else:
            shapes["moe"] = moe.shapes(config)
        module = Parameters(shapes, config)
        return module.init(jax.random.fold_in(key_blocks, layer))["params"]

    shell = Parameters(shell_shapes(config), config)
    return {
        **shell.init(key_shell)["params"],
        "blocks": {
            slot: jax.lax.map(
                functools.partial(layer_params, group.kinds[slot]), jnp.array(indices)
            )
            for group in layer_groups(config.block_kinds)
            for slot, indices in group.layers.items()
        },
    }


def count_parameters(config: ModelConfig) -> tuple[int, int]:
    """(total, active per token); both include the embeddings and the whole router."""
    shapes = jax.eval_shape(functools.partial(init, config), jax.random.key(0))
    total, active, A = 0, 0, config.active_experts
    for name, leaf in tree.flatten(shapes).items():
        total += leaf.size
        active += leaf.size * A // config.num_experts if "moe/experts" in name else leaf.size
    return total, active


def apply(
    params: dict,
    tokens_BT: jax.Array,
    config: ModelConfig,
    *,
    positions_BT: jax.Array | None = None,
    segment_ids_BT: jax.Array | None = None,
    return_routing: bool = False,
) -> Output:
    """The logits [B, T, V] in float32 and the routers' statistics.

    Without `segment_ids_BT` each row is one document; an id of 0 is padding. Positions default to
    0, 1, … along the row.

    Raises: ValueError for rows beyond the learned positions.
    """
    B, T = tokens_BT.shape
    if positions_BT is None:
        positions_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
    if segment_ids_BT is None:
        segment_ids_BT = jnp.ones((B, T), jnp.int32)
    shared = Shared(positions_BT, segment_ids_BT)
    x_BTD, stats = hidden_states(params, tokens_BT, shared, config, return_routing=return_routing)
    unembed_DV = unembedding(params).astype(x_BTD.dtype)
    logits_BTV = jnp.einsum("btd,dv->btv", x_BTD, unembed_DV, preferred_element_type=jnp.float32)
    return Output(logits_BTV, stats)


def unembedding(params: dict) -> jax.Array:
    """The output matrix [D, V]; the transposed embedding if the two are tied."""
    return params["unembed"] if "unembed" in params else params["embed"]["tokens"].T


def hidden_states(
    params: dict,
    tokens_BT: jax.Array,
    shared: Shared,
    config: ModelConfig,
    *,
    return_routing: bool = False,
) -> tuple[jax.Array, RouterStats | None]:
    """The final norm's output, and the statistics of the sparse layers in the model's order."""
    x_BTD, stats, _ = run_blocks(params, tokens_BT, shared, config, return_routing=return_routing)
    return x_BTD, stats


def embed(
    params: dict, tokens_BT: jax.Array, positions_BT: jax.Array, config: ModelConfig
) -> jax.Array:
    """The input of the first block, [B, T, D].

    Raises: ValueError for rows beyond the learned positions, which jit would clamp to the last.
    """
    config.check_rows(tokens_BT.shape[1])
    x_BTD = embedded(params["tokens"], tokens_BT).astype(config.dtype)
    if config.position_embedding == "learned":
        x_BTD += params["positions"][positions_BT].astype(config.dtype)
    return sharding.constrain_batch(x_BTD)


def embedded(table_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    """The rows of the table for the tokens, [B, T, D].

    With a mesh each device looks up its own tokens in its own part of the vocabulary. If the table
    is sharded along both axes, automatic partitioning would send the whole batch's rows and their
    gradient to every device.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return table_VD[tokens_BT]
    spec = sharding.spec_of("embed/tokens")

    def of_device(table_VD, tokens_BT):
        table_VD = sharding.all_gather(table_VD, spec, keep=sharding.TENSOR)
        own_BT = tokens_BT - jax.lax.axis_index(sharding.TENSOR) * len(table_VD)
        here_BT = (own_BT >= 0) & (own_BT < len(table_VD))
        x_BTD = jnp.where(here_BT[..., None], table_VD.at[own_BT].get(mode="clip"), 0)
        return jax.lax.psum(x_BTD, sharding.TENSOR)

    return jax.shard_map(
        of_device, in_specs=(spec, sharding.BATCH), out_specs=sharding.BATCH, check_vma=False
    )(table_VD, tokens_BT)


def run_blocks(
    params: dict,
    tokens_BT: jax.Array,
    shared: Shared,
    config: ModelConfig,
    *,
    return_routing: bool = False,
    cache: dict | None = None,
) -> tuple[jax.Array, RouterStats | None, dict]:
    """`hidden_states`, and the cache after these positions.

    Args:
      cache: by slot, stacks [L, B, S, K, H] of the keys and values before these positions.
    """
    with jax.named_scope("embedding"):
        x_BTD = embed(params["embed"], tokens_BT, shared.positions_BT, config)
    stats_of_layers, order, caches = [], [], dict(cache or {})
    for group in layer_groups(config.block_kinds):
        per_layer = {slot: {"index": jnp.array(ls)} for slot, ls in group.layers.items()}
        blocks = {slot: params["blocks"][slot] for slot in group.kinds}
        step = remat.checkpointed(
            functools.partial(_group_step, group, config, return_routing, shared, blocks),
            config.remat,
        )
        unroll = 1 if caches else _layers_at_once(config)
        scanned = jnp.arange(group.repeats), host_memory.without_stacks(blocks), per_layer
        # The cache is carried and not scanned, because a scan copies what it scans.
        (x_BTD, caches), stats = jax.lax.scan(step, (x_BTD, caches), scanned, unroll=unroll)
        stats_of_layers += stats.values()
        order += [layer for slot in stats for layer in group.layers[slot]]
    x_BTD = layers.norm(x_BTD, params["final_norm"], config)
    if not order:
        return x_BTD, None, caches
    stacked = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *stats_of_layers)
    in_order = sorted(range(len(order)), key=order.__getitem__)
    return x_BTD, jax.tree.map(lambda leaf: leaf[jnp.array(in_order)], stacked), caches


def _layers_at_once(config: ModelConfig) -> int | bool:
    """The number of layers in one step of the scan over them; True is all.

    A scan copies the values kept for the backward pass into a stack and out again. A step therefore
    has four layers on a CPU, where a single core does this copying (4 layers of 8 experts take 0.95
    of the time), and all layers on a GPU. With remat a step has one layer: nothing is copied, and
    in an unrolled scan XLA would merge the recomputation with the forward pass and so keep the
    values. Decoding, which reads few weights, also has one.
    """
    if config.remat != "none":
        return 1
    return {"cpu": 4, "gpu": True}.get(implementations.platform(), 1)


def _group_step(group: LayerGroup, config, return_routing, shared, all_blocks, carry, scanned):
    (x_BTD, caches), (row, blocks, per_layer) = carry, scanned
    stats = {}
    for slot, kind in group.kinds.items():
        cache = {"cache": {**caches[slot], "at": (row,)}} if caches else {}
        x_BTD, output = block(
            x_BTD,
            rows_of_stacks(blocks[slot], all_blocks[slot], row),
            {**per_layer[slot], **cache},
            shared,
            config=config,
            kind=kind,
            return_routing=return_routing,
        )
        if output.cache:
            caches = {**caches, slot: {name: output.cache[name] for name in ("k", "v")}}
        if kind.feed_forward == MOE:
            stats[slot] = output.stats
    return (x_BTD, caches), stats
