"""A model's folder: reads and writes Hugging Face folders and runs' workdirs in the same way."""

import contextlib
import dataclasses
import functools
import os
import pathlib
import re
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import command_line, files, hf, model, spelling, tree
from moe_jax import config as configs
from moe_jax.analysis import recording
from moe_jax.config import resolved
from moe_jax.config.sections import Lora
from moe_jax.data import chat_template, tokenizer_files, tokenizers
from moe_jax.evaluation import generate
from moe_jax.evaluation.subject import Subject
from moe_jax.hf import beside, folders, safetensors, tensors, writing
from moe_jax.model import comparison
from moe_jax.model.fields import without_effect
from moe_jax.parallel import distributed, sharding
from moe_jax.parallel import mesh as meshes
from moe_jax.training import checkpoint, lora
from moe_jax.upcycle import plan as plans
from moe_jax.upcycle import streaming

# The option of commands that read a model.
ALLOW_NONFINITE = {
    "action": "store_true",
    "help": "only warn of NaN and infinite values in a model, which are refused otherwise",
}


def find(name: str) -> configs.Source:
    """A model: a folder found by its name, by the name of a sweep's run without its id, or by a
    unique prefix, each followed by @STEP for a run's checkpoint of that step.

    Raises: ValueError for a name that matches no folder, or several, and for a step that the run
      does not have.
    """
    source = configs.source_of(name)
    found = dataclasses.replace(source, folder=_folder(source.folder))
    found.check()
    return found


def _folder(path: pathlib.Path) -> pathlib.Path:
    if path.exists():
        return path
    names = sorted(p.name for p in path.parent.glob("*") if p.is_dir())
    found = [name for name in names if name.startswith(path.name)]
    of_sweep = [name for name in found if re.fullmatch("-[0-9a-f]{10}", name[len(path.name) :])]
    for only in (of_sweep, found):
        if len(only) == 1:
            return path.parent / only[0]
    near = f"; it may be {' or '.join(found)}" if found else spelling.did_you_mean(path.name, names)
    raise ValueError(f"{path} is neither a Hugging Face folder nor a run: it is not there{near}")


def load_alike(
    sources: Sequence[configs.Source], mesh: jax.sharding.Mesh, *, allow_nonfinite: bool = False
) -> tuple[model.ModelConfig, list[dict]]:
    """The common config and the parameters of models; raises ValueError if they are not alike."""
    check_alike({source: configs.model_of(source.folder) for source in sources})
    loaded = [load(source, mesh, allow_nonfinite=allow_nonfinite) for source in sources]
    return loaded[0][0], [params for _, params in loaded]


def check_alike(models: Mapping[Any, model.ModelConfig]) -> None:
    """Raises ValueError, naming the fields that differ, for models that compute differently."""
    (first, ours), *others = models.items()
    for path, theirs in others:
        if differing := comparison.differences(theirs, ours):
            raise ValueError(
                f"{path} is another model than {first}: {'; '.join(differing)}; "
                "parents must be of one size and kind"
            )


def load(
    source: configs.Source | pathlib.Path, mesh: jax.sharding.Mesh, *, allow_nonfinite: bool = False
) -> tuple[model.ModelConfig, dict]:
    """The model config and the sharded parameters of a Hugging Face folder or a run's workdir.

    For a run without a step it loads the newest checkpoint that verifies. The pairs of LoRA are
    merged into their matrices.

    Raises: ValueError for a folder that is neither, or is damaged, for a step that the run does not
      have, and for values that are not finite unless they are allowed.
    """
    source = configs.Source(source) if isinstance(source, pathlib.Path) else source
    source.check()
    workdir = source.folder
    if folders.is_folder(workdir):
        return hf.load(workdir, mesh=mesh, allow_nonfinite=allow_nonfinite)
    model_config = configs.model_of(workdir)
    pairs = Lora(**configs.load_json(workdir).lora.to_dict())
    shapes = jax.eval_shape(
        lambda key: lora.added(model.init(model_config, key), pairs, key), jax.random.key(0)
    )
    abstract = sharding.abstract(shapes, mesh)
    loaded, saved = checkpoint.load(
        *(source.checkpoints, {"params": abstract}), own_dtypes=True, step=source.step
    )
    if differing := comparison.differences(model_config, resolved.model_in(saved)):
        raise ValueError(
            f"{workdir / 'config.json'} is of another model than the checkpoint: "
            f"{'; '.join(differing)}; set these as they were"
        )
    check_finite(source, loaded["params"], allow=allow_nonfinite)
    return model_config, lora.merging(pairs, mesh)(loaded["params"])


def weights(source: configs.Source, *, allow_nonfinite: bool = False) -> recording.Weights:
    """The parameters of a model, leaf by leaf: a folder's stay on disk, a run's are loaded.

    Raises: ValueError like `load`.
    """
    if folders.is_folder(source.folder):
        folder = folders.Folder(source.folder, allow_nonfinite=allow_nonfinite)
        return recording.Weights(folder.config, folder.parts, folder.leaf, folder.fingerprint())
    config, params = load(source, meshes.one_device(), allow_nonfinite=allow_nonfinite)
    leaves = tree.flatten(params)

    def leaf(path: str, index: tuple[slice, ...]) -> np.ndarray:
        return np.asarray(leaves[path][index])

    return recording.Weights(config, leaves, leaf, repr(sorted(checkpoint.digests(leaves).items())))


def check_finite(source: configs.Source, leaves: dict, *, allow: bool) -> None:
    """Raises: ValueError with the leaves that have NaN or infinite values; `allow` prints it."""
    counts = jax.device_get(_count_not_finite(tree.flatten(leaves)))
    if found := {path: int(number) for path, number in counts.items() if number}:
        tensors.refuse_not_finite(source, found, allow=allow)


@jax.jit
def _count_not_finite(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
    # In float32, because a leaf may have 2**32 elements: int32 would count them as 0.
    return {p: jnp.sum(~jnp.isfinite(leaf), dtype=jnp.float32) for p, leaf in leaves.items()}


def with_experts_per_token(config: model.ModelConfig, number: int | None) -> model.ModelConfig:
    """The model with another number of experts per token; None leaves its own.

    Raises: ValueError, in one line, for a number that the model cannot have or that does nothing.
    """
    if number is None:
        return config
    config = dataclasses.replace(config, num_experts_per_tok=number)
    for line in without_effect(config, ["num_experts_per_tok"], "--"):
        raise ValueError(line)
    return config


def tokenizer_for(
    folder: pathlib.Path, config: model.ModelConfig, name: str | None = None
) -> tokenizers.Tokenizer:
    """The model's own tokenizer, or the one named; ValueError if the model has fewer ids."""
    with command_line.naming("--tokenizer", "data.tokenizer"):
        tokenizer = tokenizers.load(name or configs.tokenizer_of(folder))
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} ids and the model {config.vocab_size}; "
            "give the tokenizer that it was trained with, by --tokenizer or config.data.tokenizer"
        )
    return tokenizer


def evaluation_mesh(config: model.ModelConfig) -> jax.sharding.Mesh:
    """A mesh of all devices, with the parameters in as many shards as their sizes allow."""
    shapes = jax.eval_shape(functools.partial(model.init, config), jax.random.key(0))
    for parts in range(jax.device_count(), 1, -1):
        if jax.device_count() % parts == 0:
            mesh = meshes.make({"fsdp": parts, "data": -1})
            with contextlib.suppress(ValueError):  # an axis is not divisible by this number
                sharding.abstract(shapes, mesh)
                return mesh
    return meshes.make({"data": -1})


def subject(
    name: str,
    *,
    tokenizer: str | None = None,
    batch_size: int = 8,
    limit: int | None = None,
    num_experts_per_tok: int | None = None,
    allow_nonfinite: bool = False,
) -> Subject:
    """A model to evaluate, found by its name as in `find`, on all devices.

    Args:
      limit: the largest number of tokens to read at once; None is the model's own limit.

    Raises: ValueError, in one line, for options that do not fit the model, and as `load` does.
    """
    how: dict[str, Any] = {"tokenizer": tokenizer, "num_experts_per_tok": num_experts_per_tok}
    found, config, own, limit = readable(name, batch_size=batch_size, limit=limit, **how)
    mesh = evaluation_mesh(config)
    shards = sharding.batch_shards(mesh.shape)
    return Subject(
        name=str(found),
        config=config,
        params=load(found, mesh, allow_nonfinite=allow_nonfinite)[1],
        mesh=mesh,
        tokenizer=own,
        end_ids=end_ids(found.folder, own),
        batch_size=-(-batch_size // shards) * shards,
        limit=limit,
    )


def readable(
    name: str,
    *,
    tokenizer: str | None,
    batch_size: int,
    limit: int | None,
    num_experts_per_tok: int | None,
) -> tuple[configs.Source, model.ModelConfig, tokenizers.Tokenizer, int]:
    """The facts of a model to evaluate, without its weights: its source, config, tokenizer and the
    largest number of tokens to read at once. The arguments and errors are those of `subject`."""
    found = find(name)
    config = with_experts_per_token(configs.model_of(found.folder), num_experts_per_tok)
    generate.independent(config)  # refuses a model that cannot score a continuation
    limit = config.max_position_embeddings if limit is None else limit
    if batch_size < 1 or limit < 1:
        raise ValueError(f"batch_size={batch_size} and limit={limit} must be at least 1")
    config.check_rows(limit)
    return found, config, tokenizer_for(found.folder, config, tokenizer), limit


def end_ids(workdir: pathlib.Path, tokenizer: tokenizers.Tokenizer) -> tuple[int, ...]:
    """The ids that end a generated text: from the folder, or those that ended training texts."""
    named = tokenizer_files.ends(tokenizer_files.Folder(tokenizer_folder(workdir)))
    ends = named or tokenizer.end_ids
    return ends if folders.is_folder(workdir) else (*ends, tokenizer.eos_id)


def template_of(workdir: pathlib.Path) -> pathlib.Path:
    """The file of a model's chat template."""
    return tokenizer_folder(workdir) / chat_template.FILE


def tokenizer_folder(workdir: pathlib.Path) -> pathlib.Path:
    """The folder of the files that go with a model's tokenizer."""
    return workdir if folders.is_folder(workdir) else workdir / resolved.TOKENIZER


def save_as(
    kind: str,
    output: pathlib.Path,
    model_config: model.ModelConfig,
    params: dict,
    *,
    source: pathlib.Path,
    dtype: str | None = None,
) -> None:
    """Saves a model with the source's tokenizer, as a Hugging Face folder ("hf") or a workdir
    ("orbax").

    Raises: ValueError if `output` exists or cannot hold the model, or `dtype` cannot hold its
      values.
    """
    tokenizer, kept = _beside(source)
    if kind == "orbax":
        params = tensors.cast(params, dtype) if dtype else params
        save(output, model_config, params, tokenizer=tokenizer, source=kept)
        return
    with tempfile.TemporaryDirectory() as folder:
        if kept is not None and not folders.is_folder(source):
            whole = pathlib.Path(folder)
            beside.copy(kept, whole, pathlib.Path(tokenizer) if tokenizer != "bytes" else None)
            beside.copy_config(kept, whole)
            beside.complete(whole)
            kept = whole
        hf.save(output, model_config, params, source=kept, dtype=dtype)


def _beside(source: pathlib.Path) -> tuple[str, pathlib.Path | None]:
    """A model's tokenizer, or "bytes", and the folder with the files that belong to it."""
    is_folder, tokenizer = folders.is_folder(source), "bytes"
    try:
        tokenizer = configs.tokenizer_of(source)
    except safetensors.FormatError:
        raise
    except ValueError as error:
        if not is_folder:
            distributed.say(f"{error}; it is left out")
    kept = source if is_folder else source / resolved.TOKENIZER
    return tokenizer, kept if kept.exists() else None


def save(
    workdir: pathlib.Path,
    model_config: model.ModelConfig,
    params: dict,
    *,
    tokenizer: str = "bytes",
    source: pathlib.Path | None = None,
) -> None:
    """Writes, atomically, a workdir with these parameters as the checkpoint of step 0.

    If the tokenizer is a file, it is copied there with the other files of the folder `source`.
    """
    config = configs.default()
    config.model.update(dataclasses.asdict(model_config))
    config.data.update(
        source="",
        tokenizer=tokenizer,
        sequence_length=min(model_config.max_position_embeddings, resolved.LONGEST_ROW),
    )
    if os.path.isfile(tokenizer):
        name = beside.usual_name(pathlib.Path(tokenizer))
        config.data.tokenizer = str(workdir / resolved.TOKENIZER / name)
    with files.whole_folder(workdir) as unfinished:
        keep_tokenizer(unfinished, tokenizer, source=source)
        configs.save_json(config, unfinished)
        checkpoint.save(
            unfinished / "checkpoints",
            0,
            {"params": params},
            data={},
            config=config.to_dict(),
        )


def keep_tokenizer(
    workdir: pathlib.Path, tokenizer: str, *, source: pathlib.Path | None = None
) -> None:
    """If the tokenizer is a file, copies it with its related files into a workdir that has none.

    `source` is the folder with the related files, by default the tokenizer's folder.
    """
    file = pathlib.Path(tokenizer) if os.path.isfile(tokenizer) else None
    source = source or (file and file.parent)
    if source is None or (workdir / resolved.TOKENIZER).exists():
        return
    with files.whole_folder(workdir / resolved.TOKENIZER) as unfinished:
        beside.copy(source, unfinished, file)
        beside.copy_config(source, unfinished)


def upcycle_folders(
    plan: plans.Plan,
    parents: Sequence[folders.Folder],
    output: str | pathlib.Path,
    key: jax.Array,
    *,
    progress: bool = False,
    max_shard_bytes: int = 4 * 10**9,
) -> None:
    """Executes the plan on the parents and writes a Hugging Face folder, one expert at a time.

    Raises: ValueError for parents that are not alike, and like `hf.save`.
    """
    first = parents[0]
    check_alike({parent.path: parent.config for parent in parents})
    for other in parents[1:]:
        for path, dtype in first.dtypes().items():
            if (theirs := other.dtypes()[path]) != dtype:
                raise ValueError(
                    f"{other.path} is not stored in the dtypes of {first.path}: {path} is "
                    f"{theirs}, not {dtype}; convert one with scripts/convert.py --dtype, or give "
                    "--to=orbax"
                )
    stream = streaming.Stream(plan, parents, key)
    writing.write(
        output,
        plan.config,
        stream.dtypes(),
        lambda part: stream.part(part.path, part.row),
        source=first.path,
        progress=progress,
        max_shard_bytes=max_shard_bytes,
    )
