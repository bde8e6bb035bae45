"""Upcycling from folder to folder, an expert at a time: no more than a layer is in memory."""

import functools
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import model
from moe_jax.hf import folders, tensors, writing
from moe_jax.model.config import MOE
from moe_jax.model.layout import slots
from moe_jax.upcycle import mixing, plan, recipes, router_init
from moe_jax.upcycle import transform as upcycling


def upcycle_folder(
    sources: Sequence[folders.Folder],
    output: str | pathlib.Path,
    config: model.ModelConfig,
    *,
    recipe: str,
    key: jax.Array,
    router: str = "",
    statistics: dict[str, np.ndarray] | None = None,
    progress: bool = False,
    max_shard_bytes: int = 4 * 10**9,
    **parameters,
) -> None:
    """What `upcycle.upcycle` makes of the sources' parameters, bitwise, as a folder.

    Raises: ValueError as `upcycle.upcycle` and `hf.save`, and for sources that are not alike.
    """
    first = sources[0]
    for other in sources[1:]:
        if other.config != first.config:
            raise ValueError(
                f"{other.path} is another model than {first.path}; parents must be of one size "
                "and family"
            )
        if other.dtypes() != first.dtypes():
            raise ValueError(
                f"{other.path} is not stored in the dtypes of {first.path}; convert one with "
                "scripts/convert.py --dtype, or give --to=orbax"
            )
    made = plan.make(
        first.config,
        config,
        recipe=recipe,
        router=router,
        num_parents=len(sources),
        statistics=statistics,
        parameters=parameters,
    )
    maker = _Maker(sources, made, key)
    dtypes = maker.dtypes()
    writing.write(
        output,
        config,
        dtypes,
        lambda slot: maker.part(slot).astype(dtypes[slot.path], copy=False),
        source=first.path,
        progress=progress,
        max_shard_bytes=max_shard_bytes,
    )


class _Maker:
    """Parts of the upcycled model, made when they are asked for, layer by layer."""

    def __init__(self, sources: Sequence[folders.Folder], made: plan.Plan, key: jax.Array):
        self.sources, self.made, self.key = sources, made, key
        self.from_mixture = made.recipe.takes == recipes.MIXTURE
        self.layer_of = {at: layer for layer, at in enumerate(slots(made.config.block_kinds))}
        self.row_of = slots(made.source.block_kinds)
        self._make_expert = jax.jit(functools.partial(upcycling.make_experts, made=made))
        self._mix = jax.jit(mixing.mix)
        self._fresh_router = jax.jit(
            functools.partial(upcycling.routers, made=made), static_argnames="dtype"
        )
        self._copied_router = jax.jit(functools.partial(upcycling.copied_routers, made=made))
        self._ffn = functools.lru_cache(maxsize=1)(self._read_ffn)
        self._ffn_on_device = functools.lru_cache(maxsize=1)(self._put_ffn)
        self._expert = functools.lru_cache(maxsize=2)(self._made_expert)
        self._router = functools.lru_cache(maxsize=1)(self._made_router)
        self._share_EP = functools.lru_cache(maxsize=1)(made.shares)
        self._handed_through = functools.cache(functools.partial(_handed_through, made))
        self._slots, self._dtypes = sources[0].slots, sources[0].dtypes()

    def part(self, slot: tensors.Slot) -> np.ndarray:
        if not slot.row:
            return self._rest(slot.path, ())
        _, place, inner = slot.path.split("/", 2)
        layer = self.layer_of[place, slot.row[0]]
        path, row = self.of_parent(slot.path, slot.row[0])
        kind, _, name = inner.rpartition("/")
        if kind == "moe/router":
            return np.asarray(self._router(layer)[name])[0]
        if not (kind == "moe/experts" or "/moe/experts/" in path):
            return self._rest(path, (row,))
        expert = slot.row[1] if kind == "moe/experts" else 0
        if self.from_mixture:
            return self._mixed(path, row, layer, expert)
        return self._of_dense(layer, expert, name)

    def dtypes(self) -> dict[str, np.dtype]:
        """Path of the result -> the widest dtype of what it is made of."""
        found = {}
        for path, shape in tensors.shapes(self.made.config).items():
            rows = range(shape[0]) if path.startswith("blocks/") else (0,)
            found[path] = np.result_type(*{self._dtypes[self.of_parent(path, r)[0]] for r in rows})
        return found

    def of_parent(self, path: str, own_row: int) -> tuple[str, int]:
        """Where the parents hold what a path of the result is made of, and in which row.

        A router lies where its layer's up projection does, whose dtype it takes.
        """
        if not path.startswith("blocks/"):
            return path, 0
        _, own_place, inner = path.split("/", 2)
        layer = self.layer_of[own_place, own_row]
        place, row = self.row_of[layer]
        is_sparse = self.made.source.layer_kinds[layer] == MOE
        if inner.startswith("moe/router/"):
            inner = "moe/experts/up"
        if not is_sparse:
            for prefix in ("moe/experts/", "moe/shared/", "moe/"):
                inner = inner.replace(prefix, "mlp/")
        elif inner.startswith("mlp/"):
            inner = inner.replace("mlp/", "moe/" if "norm" in inner else "moe/experts/")
        return f"blocks/{place}/{inner}", row

    def _rest(self, path, row):
        if self.made.recipe.rest == "last" or len(self.sources) == 1:
            return self.sources[-1].part(path, row)
        return np.asarray(upcycling.mean([source.part(path, row) for source in self.sources]))

    # Of dense feed-forwards.

    def _of_dense(self, layer, expert, name):
        parent = self.made.parent_of(expert, self.made.config.num_experts)
        ffn = self._ffn(layer, parent)
        if name in self._unchanged(ffn):
            return ffn[name]
        made = self._expert(layer, expert)
        if expert + 1 < self.made.config.num_experts:
            self._expert(layer, expert + 1)  # is computed while this one is written
        return np.asarray(made[name])[0, 0]

    def _read_ffn(self, layer, parent):
        place, row = self.row_of[layer]
        prefix, source = f"blocks/{place}/mlp/", self.sources[parent]
        names = [p.removeprefix(prefix) for p in self._slots if p.startswith(prefix)]
        return {n: source.part(prefix + n, (row,)) for n in names if "/" not in n}

    def _put_ffn(self, layer, parent):
        return {name: jnp.asarray(w)[None, None] for name, w in self._ffn(layer, parent).items()}

    def _made_expert(self, layer, expert):
        parent = self.made.parent_of(expert, self.made.config.num_experts)
        indices = jnp.array([layer]), jnp.array([expert])
        return self._make_expert(self._ffn_on_device(layer, parent), *indices, key=self.key)

    def _unchanged(self, ffn):
        """The matrices that the recipe hands through: their bytes are copied as they are."""
        shapes = {n: jax.ShapeDtypeStruct(w.shape, w.dtype) for n, w in ffn.items()}
        return self._handed_through(tuple(sorted(shapes.items())))

    # Of a mixture's experts.

    def _mixed(self, path, row, layer, expert):
        share_P = self._share_EP(layer)[expert]
        members = np.flatnonzero(share_P)
        parts = [self.sources[0].part(path, (row, int(p))) for p in members]
        if len(parts) == 1:
            return parts[0]
        share_1EP = jnp.array(share_P[members], jnp.float32)[None, None]
        return np.asarray(self._mix({"w": jnp.stack(parts)[None]}, share_1EP)["w"])[0, 0]

    def _made_router(self, layer):
        place, row = self.row_of[layer]
        layers_L = jnp.array([layer])
        if self.made.router != router_init.COPIED:
            up = "moe/experts/up" if self.from_mixture else "mlp/up"
            dtype = self._dtypes[f"blocks/{place}/{up}"]
            return self._fresh_router(layers_L, dtype=dtype, key=self.key)
        prefix = f"blocks/{place}/moe/router/"
        names = [p.removeprefix(prefix) for p in self._slots if p.startswith(prefix)]
        router = {n: jnp.asarray(self.sources[0].part(prefix + n, (row,)))[None] for n in names}
        share_LEP = jnp.array(self._share_EP(layer), jnp.float32)[None]
        return self._copied_router(router, share_LEP, layers_L, key=self.key)


def _handed_through(made, shapes) -> set[str]:
    same = set()

    def trace(ffn, key):
        place = recipes.Place(
            expert=jnp.zeros((), int),
            key=key,
            layer_key=key,
            config=made.config,
            granularity=made.granularity,
            neurons_F=jnp.zeros(made.config.expert_size, int),
        )
        new = made.make_expert(ffn, place)
        same.update(name for name in ffn if new[name] is ffn[name])
        return new

    jax.eval_shape(trace, dict(shapes), jax.random.key(0))
    return same
