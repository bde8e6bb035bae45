"""Writes a Hugging Face folder tensor by tensor and atomically."""

import json
import pathlib
import shutil
from collections.abc import Callable

import numpy as np
import tqdm

from moe_jax import files, model, tree
from moe_jax.data.tokenizer_files import OF_CONFIG
from moe_jax.hf import beside, configs, safetensors, tensors
from moe_jax.hf.families import FAMILIES

# Keys that are copied to a model of the same family. Other keys may hold only for the source model
# (its depth, its quantisation), and keys that affect the computation are written from ModelConfig.
OF_FAMILY = """attention_dropout attn_pdrop embd_pdrop resid_pdrop use_cache pretraining_tp
    reorder_and_upcast_attn output_router_logits router_aux_loss_coef router_jitter_noise
    consider_aux_loss""".split()


def save(
    folder: str | pathlib.Path,
    config: model.ModelConfig,
    params: dict,
    *,
    source: str | pathlib.Path | None = None,
    dtype: str | None = None,
) -> None:
    """Writes the parameters as a Hugging Face model.

    Args:
      folder: must not exist; it appears only when everything is written.
      source: a Hugging Face folder whose tokenizer, generation settings and token ids are copied.
      dtype: the dtype of all tensors; None keeps each leaf's own.

    Raises: ValueError, in one line, if no Hugging Face class can hold the model, `folder` exists,
      or finite values are beyond the range of `dtype`.
    """
    leaves = tree.flatten(params)
    dtypes = {path: np.dtype(dtype or leaf.dtype) for path, leaf in leaves.items()}
    write(folder, config, dtypes, lambda part: leaves[part.path][part.row], source=source)


def write(
    folder: str | pathlib.Path,
    config: model.ModelConfig,
    dtypes: dict[str, np.dtype],
    value: Callable[[tensors.TensorPart], np.ndarray],
    *,
    source: str | pathlib.Path | None = None,
    max_shard_bytes: int = 4 * 10**9,
    progress: bool = False,
) -> None:
    """`save` for arrays that `value` computes one after the other, layer by layer.

    `dtypes` gives the dtype in the file for each leaf's path.
    """
    values = configs.write(config)
    by_tensor: dict[str, list[tensors.TensorPart]] = {}
    for part in tensors.tensor_parts(config, FAMILIES[values["model_type"]].table):
        by_tensor.setdefault(part.name, []).append(part)
    header = {
        name: (parts[0].tensor_shape(), tree.widest(dtypes[part.path] for part in parts))
        for name, parts in by_tensor.items()
    }
    beyond: dict[np.dtype, dict[str, int]] = {dtype: {} for _, dtype in header.values()}
    values["dtype"] = values["torch_dtype"] = str(np.dtype(dtypes["embed/tokens"]))
    with files.whole_folder(folder) as unfinished:
        if source is not None:
            values = {**_carried(pathlib.Path(source), values, unfinished), **values}
        with safetensors.Writer(unfinished, header, max_shard_bytes=max_shard_bytes) as writer:
            items = tqdm.tqdm(by_tensor.items(), unit="tensor", disable=not progress)
            for name, parts in items:
                arrays = [(part, np.asarray(value(part))) for part in parts]
                dtype = header[name][1]
                tensor, beyond[dtype][name] = tensors.converted(tensors.assemble(arrays), dtype)
                writer.write(name, tensor)
        for dtype, numbers in beyond.items():
            tensors.check_beyond(dtype, numbers)
        (unfinished / "config.json").write_text(json.dumps(values, indent=2) + "\n")


def _carried(source: pathlib.Path, values: dict, unfinished: pathlib.Path) -> dict:
    """Copies the source's other files; returns the keys of its config.json to copy."""
    beside.copy(source, unfinished)
    if not (source / "config.json").exists():
        return {}
    old = configs.load_json(source)
    if old.get("model_type") != values["model_type"]:
        return {name: old[name] for name in OF_CONFIG if name in old}
    known = {name: old[name] for name in (*OF_CONFIG, *OF_FAMILY) if name in old}
    return known | _carried_code(source, old.get("auto_map"), unfinished)


def _carried_code(source: pathlib.Path, auto_map: object, unfinished: pathlib.Path) -> dict:
    """Copies the Python files of a folder if its auto_map names classes in them; returns that key.

    If a file that the key names is missing, nothing is copied and the key is left out. All files
    are copied, because they may import each other. They are never executed.
    """
    if not isinstance(auto_map, dict):
        return {}
    # "file.Class" is in the folder, "repository--file.Class" is not. Tokenizers come as a list.
    lists = (value if isinstance(value, list) else [value] for value in auto_map.values())
    names = [str(name) for classes in lists for name in classes if name is not None]
    modules = {f"{name.split('.')[0]}.py" for name in names if "--" not in name}
    if not all((source / name).is_file() for name in modules):
        return {}
    for path in source.glob("*.py") if modules else ():
        shutil.copyfile(safetensors.resolve_inside(source, path.name), unfinished / path.name)
    return {"auto_map": auto_map}
