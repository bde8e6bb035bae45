"""Upcycling from folder to folder, an expert at a time: no more than a layer is in memory."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import model
from moe_jax.hf import folders, tensors, writing
from moe_jax.model.segments import segments
from moe_jax.upcycle import params as upcycling


def upcycle_folder(
    source: folders.Folder,
    output: str | pathlib.Path,
    moe_config: model.ModelConfig,
    *,
    recipe: str,
    key: jax.Array,
    router: str = "normal",
    progress: bool = False,
    max_shard_bytes: int = 4 * 10**9,
    **parameters,
) -> None:
    """What `upcycle.upcycle` makes of the source's parameters, bitwise, as a folder.

    Raises: ValueError as `upcycle.upcycle` and `hf.save`.
    """
    maker = _Maker(source, moe_config, recipe, router, parameters, key)
    dtypes = source.dtypes()
    kept = {path: dtypes[maker.of_parent(path, 0)[0]] for path in tensors.shapes(moe_config)}
    writing.write(
        output,
        moe_config,
        kept,
        maker.part,
        source=source.path,
        progress=progress,
        max_shard_bytes=max_shard_bytes,
    )


class _Maker:
    """Parts of the upcycled model, made when they are asked for, layer by layer."""

    def __init__(self, source, moe_config, recipe, router, parameters, key):
        self.source, self.config, self.key = source, moe_config, key
        self.make_expert, make_router = upcycling.check(
            source.config, moe_config, recipe, router, parameters
        )
        self.layer_of = _rows(moe_config)
        self.row_of = {layer: place_row for place_row, layer in _rows(source.config).items()}
        self._make_router = jax.jit(
            functools.partial(upcycling.make_routers, make_router=make_router),
            static_argnums=(1, 2),
        )
        self._make_expert = jax.jit(
            functools.partial(upcycling.make_experts, make_expert=self.make_expert)
        )
        self._ffn = functools.lru_cache(maxsize=1)(self._read_ffn)
        self._ffn_on_device = functools.lru_cache(maxsize=1)(self._put_ffn)
        self._expert = functools.lru_cache(maxsize=2)(self._made_expert)

    def part(self, slot: tensors.Slot) -> np.ndarray:
        if not slot.row:
            return self.source.part(slot.path, ())
        _, place, inner = slot.path.split("/", 2)
        layer = self.layer_of[place, slot.row[0]]
        if inner == "moe/router/kernel":
            dtype = self._ffn(layer)["up"].dtype
            kernels = self._make_router(jnp.array([layer]), self.config, dtype, key=self.key)
            return np.asarray(kernels)[0]
        if inner.startswith("moe/experts/"):
            name = inner.rpartition("/")[2]
            if name in self._unchanged(layer):
                return self._ffn(layer)[name]
            made = self._expert(layer, slot.row[1])
            if slot.row[1] + 1 < self.config.num_experts:
                self._expert(layer, slot.row[1] + 1)  # is computed while this one is written
            return np.asarray(made[name])[0, 0]
        path, row = self.of_parent(slot.path, layer)
        return self.source.part(path, (row,))

    def of_parent(self, path: str, layer: int) -> tuple[str, int]:
        """Where the parent holds what a path of the child is made of."""
        if not path.startswith("blocks/"):
            return path, 0
        _, _, inner = path.split("/", 2)
        place, row = self.row_of[layer]
        if inner == "moe/router/kernel":
            inner = "mlp/up"
        inner = inner.replace("moe/experts/", "mlp/").replace("moe/", "mlp/")
        return f"blocks/{place}/{inner}", row

    def _read_ffn(self, layer):
        place, row = self.row_of[layer]
        prefix = f"blocks/{place}/mlp/"
        names = [p.removeprefix(prefix) for p in self.source.slots if p.startswith(prefix)]
        return {n: self.source.part(prefix + n, (row,)) for n in names if "/" not in n}

    def _put_ffn(self, layer):
        return {name: jnp.asarray(w)[None] for name, w in self._ffn(layer).items()}

    def _made_expert(self, layer, expert):
        indices = jnp.array([layer]), jnp.array([expert])
        return self._make_expert(self._ffn_on_device(layer), *indices, key=self.key)

    def _unchanged(self, layer):
        """The matrices that the recipe hands through: their bytes are copied as they are."""
        shapes = {n: jax.ShapeDtypeStruct(w.shape, w.dtype) for n, w in self._ffn(layer).items()}
        return _handed_through(self.make_expert, tuple(sorted(shapes.items())))


def _handed_through(make_expert, shapes) -> set[str]:
    same = set()

    def trace(ffn):
        made = make_expert(ffn, jax.random.key(0))
        same.update(name for name in ffn if made[name] is ffn[name])
        return made

    jax.eval_shape(trace, dict(shapes))
    return same


def _rows(config: model.ModelConfig) -> dict[tuple[str, int], int]:
    """(place, row) -> layer."""
    return {
        (place, row): layer
        for segment in segments(config.block_kinds)
        for place, layers in segment.layers.items()
        for row, layer in enumerate(layers)
    }
