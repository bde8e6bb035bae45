"""An open Hugging Face folder: its config, and its parameters, read by leaf or by part."""

import hashlib
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import model, tree
from moe_jax.hf import configs, safetensors, tensors
from moe_jax.hf.families import FAMILIES
from moe_jax.model.layout import slots
from moe_jax.parallel import sharding


def is_folder(path: str | pathlib.Path) -> bool:
    """True for a Hugging Face folder; False for a run's workdir, or for nothing."""
    path = pathlib.Path(path)
    return (path / "config.json").exists() and "model_type" in configs.load_json(path)


def load(
    folder: str | pathlib.Path,
    *,
    mesh: jax.sharding.Mesh | None = None,
    allow_nonfinite: bool = False,
) -> tuple[model.ModelConfig, dict]:
    """(ModelConfig, parameters) of a folder with config.json and safetensors.

    Parameters keep the dtype they are stored in. With a mesh they are sharded by the rules of
    `parallel/sharding.py`, and each process reads only the parts that its devices hold; without
    one they are numpy arrays.

    Raises: ValueError, like opening a `Folder`.
    """
    source = Folder(folder, allow_nonfinite=allow_nonfinite)
    if mesh is None:
        return source.config, source.params()
    shapes, dtypes = tensors.shapes(source.config), source.dtypes()
    abstract = {path: jax.ShapeDtypeStruct(shapes[path], dtypes[path]) for path in shapes}

    def placed(path, leaf, where):
        return jax.make_array_from_callback(
            leaf.shape, where, lambda index: source.leaf(path, index or ())
        )

    nested = tree.unflatten(abstract)
    return source.config, tree.map_with_name(placed, nested, sharding.shardings(nested, mesh))


class Folder:
    """A model's folder; opening it reads only the headers of its weights.

    Reading a tensor with NaN or infinite values raises ValueError with its name and their number,
    or prints both with `allow_nonfinite`.

    Raises: ValueError, in one line, for a folder that is not a supported model; the message lists
      missing, extra and misshapen tensors.
    """

    def __init__(self, folder: str | pathlib.Path, *, allow_nonfinite: bool = False):
        self.path = pathlib.Path(folder)
        self._allow_nonfinite = allow_nonfinite
        self._known: set[str] = set()  # tensors without such values, or that have been named
        self.config = configs.of_folder(self.path)
        self.tensors = safetensors.open_folder(self.path)
        try:
            matched = tensors.match(
                self.config, FAMILIES[str(self.config.model_type)], self.tensors
            )
        except tensors.MismatchError as error:
            raise tensors.MismatchError(f"{self.path}: {error}") from None
        self.parts: dict[str, list[tensors.TensorPart]] = {}
        for part in matched:
            self.parts.setdefault(part.path, []).append(part)
        self._dtypes = {
            path: tree.widest(self.tensors[part.name].dtype for part in parts)
            for path, parts in self.parts.items()
        }
        self._check_floats()
        self._check_head()

    def _check_floats(self) -> None:
        for part in (part for parts in self.parts.values() for part in parts):
            if not jnp.issubdtype(dtype := self.tensors[part.name].dtype, jnp.floating):
                raise tensors.MismatchError(
                    f"{self.path}: {part.name} is stored as {dtype}, but weights are "
                    "floating-point numbers; dequantise the model elsewhere"
                )

    def _check_head(self) -> None:
        head = self.tensors.get("lm_head.weight")
        if not self.config.tie_word_embeddings or head is None:
            return
        embedding = self.tensors[self.parts["embed/tokens"][0].name]
        same = head.shape == embedding.shape and np.array_equal(
            head.read().astype(np.float32), embedding.read().astype(np.float32), equal_nan=True
        )
        if not same:
            raise tensors.MismatchError(
                f"{self.path}: lm_head.weight differs from the embedding it is tied to; "
                "set tie_word_embeddings to false in config.json"
            )

    def dtypes(self) -> dict[str, np.dtype]:
        """Path of each leaf -> the widest dtype of its tensors."""
        return self._dtypes

    def fingerprint(self) -> str:
        """A hash of the names, shapes, dtypes and first values of all tensors."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.tensors.items()):
            digest.update(repr((name, str(tensor.dtype), tensor.shape)).encode())
            first = (*(slice(0, 1) for _ in tensor.shape[1:]), slice(0, 64))
            digest.update(tensor.read(first[: len(tensor.shape)]).tobytes())
        return digest.hexdigest()

    def leaf(self, path: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """The slices `index` of a leaf; its layers and experts are read one by one."""
        parts = self.parts[path]
        if parts[0].row == ():
            return np.ascontiguousarray(self._read(parts[0], index))
        depth = len(parts[0].row)
        full = (*(max(p.row[i] for p in parts) + 1 for i in range(depth)), *parts[0].shape)
        index = (*index, *(slice(None),) * (len(full) - len(index)))
        ranges = [range(size)[i] for size, i in zip(full, index, strict=True)]
        leaf = np.empty([len(r) for r in ranges], self._dtypes[path])
        for part in parts:
            if all(i in r for i, r in zip(part.row, ranges, strict=False)):
                at = tuple(i - r.start for i, r in zip(part.row, ranges, strict=False))
                tensors.copy(self._read(part, index[depth:]), leaf[at])
        return leaf

    def part(self, path: str, row: tuple[int, ...]) -> np.ndarray:
        """The leaf at the leading indices `row`, in the leaf's dtype."""
        for own in self.parts[path]:
            if own.row == row[: len(own.row)]:
                inner = row[len(own.row) :]
                part = self._read(own, tuple(slice(i, i + 1) for i in inner))[(0,) * len(inner)]
                return part.astype(self._dtypes[path], copy=False)
        raise KeyError(f"{path} has no {row}")

    def feed_forward(self, layer: int, inner: str) -> dict[str, np.ndarray]:
        """The matrices at "moe/experts" [E, …] or "mlp" of one layer, by name."""
        slot, row = slots(self.config.block_kinds)[layer]
        prefix = f"blocks/{slot}/{inner}/"
        names = [p.removeprefix(prefix) for p in self.parts if p.startswith(prefix)]
        rows = slice(row, row + 1)
        return {n: self.leaf(prefix + n, (rows,))[0] for n in names if "/" not in n}

    def params(self) -> dict:
        return tree.unflatten({path: self.leaf(path) for path in self.parts})

    def _read(self, part: tensors.TensorPart, index: tuple[slice, ...]) -> np.ndarray:
        array = tensors.read(part, self.tensors[part.name], index)
        if part.name not in self._known:
            if tensors.count_not_finite(array):
                found = {part.name: tensors.count_not_finite_in(self.tensors[part.name])}
                tensors.refuse_not_finite(self.path, found, allow=self._allow_nonfinite)
                self._known.add(part.name)
            elif array.size == math.prod(self.tensors[part.name].shape):
                self._known.add(part.name)
        return array
