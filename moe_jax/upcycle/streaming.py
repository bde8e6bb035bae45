"""Executes the plan of an upcycling part by part: at most one layer is in memory."""

import functools
from collections.abc import Mapping, Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import tree
from moe_jax.model.config import ModelConfig
from moe_jax.model.layout import slots
from moe_jax.upcycle import mixing, origins, recipes, transform
from moe_jax.upcycle import plan as plans


class Reader(Protocol):
    """A parent whose parameters are read part by part, like `hf.folders.Folder`."""

    config: ModelConfig

    def dtypes(self) -> Mapping[str, np.dtype]:
        """Path -> dtype of every leaf."""

    def part(self, path: str, row: tuple[int, ...]) -> np.ndarray:
        """The leaf at the leading indices `row`: (), (row in the stack) or (row, expert)."""


class Stream:
    """The model that `transform.execute` makes, bit for bit, with each part computed on demand.

    If the caller asks layer by layer and expert by expert, each expert is made once and each
    feed-forward read once.
    """

    def __init__(self, plan: plans.Plan, parents: Sequence[Reader], key: jax.Array):
        self.plan, self.parents, self.key = plan, parents, key
        self._parent_dtypes = parents[0].dtypes()
        self._shell = plan.shell(self._parent_dtypes)
        self._layers = plan.layers(self._parent_dtypes)
        self._layer_of = {at: layer for layer, at in enumerate(slots(plan.config.block_kinds))}
        self._slot_rows = slots(plan.source.block_kinds)
        self._dtypes = self._widest_dtypes()

        def jitted(function, *static):
            bound = functools.partial(function, plan=plan, key=key)
            return jax.jit(bound, static_argnums=static)

        self._make_expert = jitted(transform.make_experts)
        self._fresh_router = jitted(transform.fresh_router, 1, 2)
        self._copied_router = jitted(transform.copied_router, 0)
        self._mix = jax.jit(mixing.mix)
        self._ffn = functools.lru_cache(maxsize=1)(self._read_ffn)
        self._ffn_on_device = functools.lru_cache(maxsize=1)(self._put_ffn)
        self._expert = functools.lru_cache(maxsize=2)(self._made_expert)
        self._share_EP = functools.lru_cache(maxsize=1)(plan.shares)
        self._handed_through = functools.cache(functools.partial(_handed_through, plan))

    def dtypes(self) -> dict[str, np.dtype]:
        """Path of each leaf of the result -> the widest dtype of the parents' leaves it uses."""
        return self._dtypes

    def part(self, path: str, row: tuple[int, ...]) -> np.ndarray:
        """The leaf of the result at the leading indices `row`, like `Reader.part`."""
        return self._made(path, row).astype(self._dtypes[path], copy=False)

    def _made(self, path, row):
        if not path.startswith("blocks/"):
            return self._kept(self._shell[path], path, row)
        _, slot, leaf = path.split("/", 2)
        layer, name = self._layer_of[slot, row[0]], leaf.rpartition("/")[2]
        origin, expert = self._layers[layer][leaf], row[1] if len(row) > 1 else 0
        source, source_row = self._source_of(layer, origin), self._slot_rows[layer][1]
        match origin:
            case origins.Kept():
                return self._kept(origin, source, (source_row, *row[1:]))
            case origins.Stacked():
                own = [self.parents[p].part(source, (source_row,)) for p in origin.parents]
                return np.stack(own)
            case origins.Expert():
                return self._of_ffn(layer, expert, name, origin.parents)
            case origins.Mixture():
                return self._mixed(source, source_row, layer, expert)
            case origins.CopiedRouter():
                w_1X = jnp.asarray(self.parents[0].part(source, (source_row,)))[None]
                share_1EP = jnp.array(self._share_EP(layer), jnp.float32)[None]
                return np.asarray(self._copied_router(name, w_1X, share_1EP, jnp.array([layer])))[0]
            case origins.FreshRouter():
                dtype = self._dtypes[path]
                return np.asarray(self._fresh_router(jnp.array([layer]), origin, dtype))[0]

    def _source_of(self, layer: int, origin: origins.Origin) -> str:
        return f"blocks/{self._slot_rows[layer][0]}/{origin.path}"

    def _widest_dtypes(self) -> dict[str, np.dtype]:
        found = {path: {self._parent_dtypes[path]} for path in self._shell}
        for (slot, _), layer in self._layer_of.items():
            for leaf, origin in self._layers[layer].items():
                dtype = self._parent_dtypes[self._source_of(layer, origin)]
                found.setdefault(f"blocks/{slot}/{leaf}", set()).add(dtype)
        return {path: tree.widest(dtypes) for path, dtypes in found.items()}

    def _kept(self, origin, path, row):
        parts = [self.parents[parent].part(path, row) for parent in origin.parents]
        return parts[0] if len(parts) == 1 else np.asarray(transform.mean(parts))

    def _of_ffn(self, layer, expert, name, parents):
        ffn = self._ffn(layer, parents[expert])
        shapes = {n: jax.ShapeDtypeStruct(w.shape, w.dtype) for n, w in ffn.items()}
        if name in self._handed_through(tuple(sorted(shapes.items()))):
            return ffn[name]
        made = self._expert(layer, expert, parents[expert])
        if parents[expert + 1 : expert + 2] == parents[expert : expert + 1]:
            # The device computes the next expert while this one is written.
            self._expert(layer, expert + 1, parents[expert])
        return np.asarray(made[name])[0, 0]

    def _read_ffn(self, layer, parent):
        slot, row = self._slot_rows[layer]
        folder, reader = f"blocks/{slot}/mlp/", self.parents[parent]
        names = [p.removeprefix(folder) for p in self._parent_dtypes if p.startswith(folder)]
        return {n: reader.part(folder + n, (row,)) for n in names if "/" not in n}

    def _put_ffn(self, layer, parent):
        return {name: jnp.asarray(w)[None, None] for name, w in self._ffn(layer, parent).items()}

    def _made_expert(self, layer, expert, parent):
        ffn = self._ffn_on_device(layer, parent)
        return self._make_expert(ffn, jnp.array([layer]), jnp.array([expert]))

    def _mixed(self, path, row, layer, expert):
        share_P = self._share_EP(layer)[expert]
        members = np.flatnonzero(share_P)
        parts = [self.parents[0].part(path, (row, int(p))) for p in members]
        if len(parts) == 1:
            return parts[0]
        share_1EP = jnp.array(share_P[members], jnp.float32)[None, None]
        return np.asarray(self._mix(jnp.stack(parts)[None], share_1EP))[0, 0]


def _handed_through(plan, shapes) -> set[str]:
    """The matrices that the recipe leaves unchanged: their bytes are copied as they are."""
    same = set()

    def trace(ffn, key):
        context = recipes.ExpertContext(
            expert=jnp.zeros((), int),
            key=key,
            layer_key=key,
            config=plan.config,
            granularity=plan.granularity,
            neurons_F=jnp.zeros(plan.config.expert_size, int),
        )
        new = plan.recipe.make(ffn, context, **plan.parameters)
        same.update(name for name in ffn if new[name] is ffn[name])
        return new

    jax.eval_shape(trace, dict(shapes), jax.random.key(0))
    return same
