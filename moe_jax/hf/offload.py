"""A mixture larger than memory: its experts stay in the folder, and those used last in memory.

Reads a Hugging Face folder for `ops/offloaded.py` (Eliseev and Mazur, arXiv 2312.17238).
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import itertools
import math
import pathlib
import threading
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import model, tree
from moe_jax.hf import folders, tensors
from moe_jax.model.layout import layer_groups, slots, sparse_layers
from moe_jax.ops import host_memory, offloaded
from moe_jax.parallel import allocator

MATRICES = ("gate", "up", "down")


@dataclasses.dataclass
class Counts:
    """Matrices that products asked for, and the bytes that were read from the folder."""

    in_memory: int = 0
    ahead: int = 0  # in memory, or on their way, because the layer before expected them
    waited: int = 0
    bytes_read: int = 0


class ExpertStore:
    """The experts' matrices, in memory up to `most_bytes`, an equal part for each sparse layer.

    A layer forgets the matrices first that it has not used for the longest time.

    Raises: ValueError if there is no room for one matrix of each layer.
    """

    def __init__(self, folder: folders.Folder, most_bytes: float):
        self.counts = Counts()
        self.failure: BaseException | None = None  # of a product, which JAX raises as its own
        self._folder, self._config = folder, folder.config
        self._layers = sparse_layers(folder.config)
        self.names = [n for n in MATRICES if f"{self._path(0)}/{n}" in folder.parts]
        self._bytes = [
            {name: self._bytes_of(f"{self._path(layer)}/{name}") for name in self.names}
            for layer in range(len(self._layers))
        ]
        largest = max(max(of_layer.values()) for of_layer in self._bytes)
        self._room = most_bytes / len(self._layers)
        # More of them, as for a prompt's tokens, would push out those that this token needs.
        expert = max(sum(of_layer.values()) for of_layer in self._bytes)
        self._most_expected = int(self._room / expert) - folder.config.active_experts
        if largest > self._room:
            least = 1.05 * largest * len(self._layers) / 1e9  # not less when it is rounded
            raise ValueError(
                f"{most_bytes / 1e9:g} GB have no room for one matrix of each of the "
                f"{len(self._layers)} sparse layers; give at least {least:.2g} GB"
            )
        # Layer -> (expert, name) -> its matrix, or the reading of it; the newest last.
        self._held: list[collections.OrderedDict[tuple[int, str], concurrent.futures.Future]]
        self._held = [collections.OrderedDict() for _ in self._layers]
        self._expected: set[tuple[int, int, str]] = set()
        self._lock = threading.Lock()
        self._ahead = concurrent.futures.ThreadPoolExecutor(1, "experts")

    def matrix(self, layer: int, expert: int, name: str, *, again: bool) -> np.ndarray:
        try:
            return self._matrix(layer, expert, name, again)
        except BaseException as error:
            self.failure = error
            raise

    @contextlib.contextmanager
    def failing_as_it_is(self) -> Iterator[None]:
        """Raises what made a product fail, such as damage of a file, instead of JAX's own error."""
        try:
            yield
        except jax.errors.JaxRuntimeError:
            if self.failure is None:
                raise
            raise self.failure from None

    def _matrix(self, layer: int, expert: int, name: str, again: bool) -> np.ndarray:
        key, own = (expert, name), None
        with self._lock:
            held = self._held[layer]
            if key in held:
                expected = (layer, *key) in self._expected
                self._expected.discard((layer, *key))
                self.counts.ahead += expected
                self.counts.in_memory += not (expected or again)
                held.move_to_end(key)
            else:
                self.counts.waited += 1
                own = concurrent.futures.Future[np.ndarray]()
                self._hold(layer, key, own)
            reading = held[key]
        if own is not None:
            try:
                own.set_result(self._read(layer, expert, name))
            except BaseException as error:
                own.set_exception(error)
        return reading.result()

    def expect(self, layer: int, experts: list[int]) -> None:
        if layer == len(self._layers) or len(experts) > self._most_expected:
            return
        with self._lock:
            for key in itertools.product(experts, self.names):
                if key not in self._held[layer]:
                    self._expected.add((layer, *key))
                    self._hold(layer, key, self._ahead.submit(self._read, layer, *key))

    def _hold(self, layer: int, key: tuple[int, str], reading: concurrent.futures.Future) -> None:
        held = self._held[layer]
        room = self._room - self._bytes[layer][key[1]]
        while held and sum(self._bytes[layer][name] for _, name in held) > room:
            forgotten, _ = held.popitem(last=False)
            self._expected.discard((layer, *forgotten))
        held[key] = reading

    def _read(self, layer: int, expert: int, name: str) -> np.ndarray:
        _, row = slots(self._config.block_kinds)[self._layers[layer]]
        part = self._folder.part(f"{self._path(layer)}/{name}", (row, expert))
        matrix = np.empty(part.shape, part.dtype)
        tensors.copy(part, matrix)
        with self._lock:
            self.counts.bytes_read += matrix.nbytes
        return matrix

    def _path(self, layer: int) -> str:
        slot, _ = slots(self._config.block_kinds)[self._layers[layer]]
        return f"blocks/{slot}/moe/experts"

    def _bytes_of(self, path: str) -> int:
        *_, rows, columns = tensors.shapes(self._config)[path]
        return rows * columns * self._folder.dtypes()[path].itemsize


def load(
    path: str | pathlib.Path, most_bytes: float, *, allow_nonfinite: bool = False
) -> tuple[model.ModelConfig, dict, ExpertStore]:
    """The config, the parameters and the store of a folder, like `hf.load`.

    In the parameters, `ops/offloaded.py`'s leaves stand for the experts' matrices.

    Raises: ValueError like `ExpertStore` and `folders.Folder`, and for a model without experts.
    """
    folder, matrices = _open(path, allow_nonfinite)
    config, sparse = folder.config, sparse_layers(folder.config)
    allocator.return_freed_memory()  # experts come and go
    store = ExpertStore(folder, most_bytes)
    number, shapes = offloaded.register(store), tensors.shapes(config)
    routers = [
        folder.part(f"blocks/{slot}/moe/router/kernel", (row,))
        for slot, row in (slots(config.block_kinds)[layer] for layer in sparse)
    ]

    def leaf(path):
        if path not in matrices:
            return jnp.array(folder.leaf(path))
        name, layers = matrices[path]
        numbers = np.array([sparse.index(layer) for layer in layers], np.int32)
        after = [routers[min(n + 1, len(sparse) - 1)] for n in numbers]
        return offloaded.Offloaded(
            layer=jnp.array(numbers),
            next_router=jnp.array(np.stack(after)) if name == "up" else None,
            name=name,
            matrices=shapes[path][1:],
            per_token=config.active_experts,
            store=number,
        )

    return config, tree.unflatten({path: leaf(path) for path in folder.parts}), store


def load_into_host_memory(
    path: str | pathlib.Path, most_bytes: float, *, allow_nonfinite: bool = False
) -> tuple[model.ModelConfig, dict]:
    """The config and the parameters of a folder, for an accelerator, like `hf.load`.

    In the parameters, `ops/host_memory.py`'s leaves stand for the experts' matrices.

    Raises: ValueError like `folders.Folder`, for a model without experts, and if one layer's
      experts, which the tokens of a prompt may all choose, have more than `most_bytes`.
    """
    folder, matrices = _open(path, allow_nonfinite)
    config = folder.config
    shapes, dtypes = tensors.shapes(config), folder.dtypes()
    of_layer: dict[str, int] = collections.defaultdict(int)
    for name in matrices:
        of_layer[name.rpartition("/")[0]] += math.prod(shapes[name][1:]) * dtypes[name].itemsize
    if (most := max(of_layer.values())) > most_bytes:
        raise ValueError(
            f"{most_bytes / 1e9:g} GB have no room for the experts of one layer; give at least "
            f"{1.05 * most / 1e9:.2g} GB"  # not less when it is rounded
        )
    there = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind=host_memory.KIND)

    def leaf(path):
        if path not in matrices:
            return jnp.array(folder.leaf(path))
        L, E, D, F = shapes[path]
        stack_XDF = np.asarray(folder.leaf(path)).reshape(L * E, D, F)
        return host_memory.HostExperts(
            jax.device_put(stack_XDF, there), jnp.arange(L), matrices=(E, D, F)
        )

    return config, tree.unflatten({path: leaf(path) for path in folder.parts})


def _open(path, allow_nonfinite: bool) -> tuple[folders.Folder, dict[str, tuple]]:
    """The folder, and the name and layers of each stack of its experts' matrices."""
    folder = folders.Folder(path, allow_nonfinite=allow_nonfinite)
    matrices = {
        f"blocks/{slot}/moe/experts/{name}": (name, layers)
        for group in layer_groups(folder.config.block_kinds)
        for slot, layers in group.layers.items()
        for name in MATRICES
    }
    matrices = {name: where for name, where in matrices.items() if name in folder.parts}
    if not matrices:
        raise ValueError(f"{path} has no experts that could stay out of memory; load it whole")
    return folder, matrices
