"""Checks a run against this machine, and against the run that is in its workdir."""

import contextlib
import dataclasses
import json
import os
import pathlib
import platform
import re
import subprocess
from collections.abc import Iterator

import jax
from flax import traverse_util
from ml_collections import ConfigDict

import moe_jax
from moe_jax.config import reading, resolved
from moe_jax.config.checks import ConfigError, refusing
from moe_jax.config.run import Run
from moe_jax.config.section import Section, section_of
from moe_jax.config.source import source_of
from moe_jax.data import batches, sources, tokenizers
from moe_jax.hf import folders
from moe_jax.model import comparison
from moe_jax.parallel import mesh, sharding


def validate_environment(run: Run, num_devices: int, *, goes_on: bool = False) -> None:
    """Refuses a run if this machine lacks its devices, data, tokenizer or parents.

    A run that resumes from its own checkpoint (`goes_on`) needs no parents.

    Raises: ConfigError, in one line that says what to change.
    """
    validate_mesh(run, num_devices)
    named = [("init.source", source) for source in run.init.sources if not goes_on]
    for key, source in {
        "objective.distillation.source": run.objective.distillation.source,
        "objective.preference.reference": run.objective.preference.reference,
    }.items():
        named += [(key, source_of(source))] if source else []
    for key, model in named:
        with refusing(f"config.{key}={str(model)!r}: "):
            model.check()
        source = str(model.folder)
        if not folders.is_folder(source) and not model.steps():
            hub = re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not os.path.exists(source)
            fetch = f" (from the hub: hf download {source} --local-dir path/to/folder)"
            raise ConfigError(
                f"config.{key}={source!r} has no checkpoints; give the workdir of a run that saved "
                f"one, or a Hugging Face folder{fetch if hub else ''}"
            )
    _validate_sources(run)
    with refusing("config."):
        tokenizer = tokenizers.load(run.data.tokenizer)
    vocab_size = run.model.vocab_size
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"config.model.vocab_size={vocab_size} is less than the {tokenizer.vocab_size} of "
            f"tokenizer {run.data.tokenizer!r}; set it to {tokenizer.vocab_size}"
        )
    with refusing("config.evaluation.prompts: "):
        prompts = [len(tokenizer.prompt(prompt)) for prompt in run.evaluation.prompts]
        if prompts:
            fix = "shorten the longest prompt, or lower evaluation.continuation_tokens"
            run.model.check_rows(max(prompts) + run.evaluation.continuation_tokens, fix)
    _validate_dtype(run)
    _validate_tokenizer(run, tokenizer)


def _validate_sources(run: Run) -> None:
    """Refuses texts that cannot be read; names all of those of a mixture."""
    problems = {}
    for name, spec in run.data.named_sources.items():
        try:
            sources.check(spec)
        except (ValueError, OSError) as error:
            if not name:
                with refusing("config."):
                    raise
            reason = " ".join(str(error).removeprefix("data.source=").partition(";")[0].split())
            problems[name] = f"{name} ({reason})"
    if problems:
        raise ConfigError(
            f"config.data.mixture: {len(problems)} of {len(run.data.named_sources)} sources cannot "
            f"be read: {'; '.join(problems.values())}; give their texts by mixture.sources, or by "
            "data.source with {name}"
        )


def _validate_tokenizer(run: Run, tokenizer: tokenizers.Tokenizer) -> None:
    """Refuses a tokenizer other than a parent's, because the embeddings belong to its ids."""
    for source in () if run.data.other_tokenizer else run.init.parents:
        try:
            name = resolved.tokenizer_of(pathlib.Path(source))
            theirs = tokenizer if name == run.data.tokenizer else tokenizers.load(name)
        except (ValueError, OSError):  # the parent's folder has no tokenizer
            continue
        if theirs.fingerprint != tokenizer.fingerprint:
            raise ConfigError(
                f"config.data.tokenizer={run.data.tokenizer!r} is not the tokenizer of "
                f"init.source={source!r}, whose embeddings the model has; leave it out, or set "
                "data.other_tokenizer=True to train them anew"
            )


def _validate_dtype(run: Run) -> None:
    device = jax.devices()[0]
    capability = getattr(device, "compute_capability", "")
    is_old = device.platform == "gpu" and re.fullmatch(r"[\d.]+", capability or "")
    if is_old and float(capability) < 8 and run.model.dtype == "bfloat16":
        raise ConfigError(
            f"config.model.dtype='bfloat16': this GPU (compute capability {capability}) has no "
            "units for it; use 'float32'"
        )


def validate_mesh(run: Run, num_devices: int) -> None:
    """Refuses a mesh that does not fit the devices, and batches that do not fit the mesh.

    Raises: ConfigError, in one line that says what to change.
    """
    with refusing("config."):
        sizes = mesh.axis_sizes(vars(run.mesh), num_devices)
    shards = sharding.batch_shards(sizes)
    microbatch = run.training.batch_size // run.training.accumulation_steps
    for key, size in (
        ("training.batch_size (over accumulation_steps)", microbatch),
        ("evaluation.batch_size", run.evaluation.batch_size),
    ):
        if size % shards:
            raise ConfigError(
                f"config.{key}={size} is not divisible by the {shards} batch shards of the mesh; "
                f"use a multiple of {shards}"
            )


def changes_since(before: dict, kept: dict, run: Run, text: dict[str, str]) -> list[str]:
    """Lists the changes since a checkpoint with the config `before` and the data `kept` was saved.

    Raises: ConfigError if it must not change.
    """
    of_config = changes(before, run.config)  # first: a changed key explains a changed text
    of_text = changed_text(kept["text"], text, run)
    return [*of_config, *of_text, *changed_versions(kept["versions"])]


def changes(before: dict, config: ConfigDict) -> list[str]:
    """The changes from the config that a run started with to `config`, as "key: old -> new".

    Raises: ConfigError if a key changed that must not change when a run is resumed.
    """
    changed, fixed = _changed(before, config), fixed_keys()
    if config.data.other_text:
        fixed -= {"data.source", "data.validation_fraction"}
    for key, (old, new) in changed.items():
        if key in fixed:
            raise ConfigError(
                f"config.{key}={new!r} differs from the {old!r} that the run in "
                "--workdir began with; give another --workdir"
            )
    lines = {key: f"{key}: {old} -> {new}" for key, (old, new) in changed.items()}
    if skipped := changed.get("data.skip_batches"):
        dropped = [str(tuple(pair)) for pair in skipped[0] if tuple(pair) not in skipped[1]]
        if dropped:  # `left_out` keeps what the checkpoint has
            lines["data.skip_batches"] += f", but {', '.join(dropped)} stay left out"
    return list(lines.values())


def _changed(before: dict, config: ConfigDict) -> dict[str, tuple]:
    with refusing("the config that was saved with the run: "):
        before = reading.stored(before).to_dict()
    old, new = (traverse_util.flatten_dict(one, sep=".") for one in (before, config.to_dict()))
    return {k: (old[k], new[k]) for k in new if json.dumps(old[k]) != json.dumps(new[k])}


def check_step(step: int, run: Run) -> None:
    """Raises: ConfigError for a checkpoint beyond the run's last step."""
    if step > (last := run.training.last_step):
        key = "stop_step" if run.training.stop_step else "num_steps"
        raise ConfigError(
            f"config.training.{key}={last}, but the run in --workdir is at "
            f"step {step} already; set it to {step} or more, or give another --workdir"
        )


def resume_step(run: Run, newest: dict) -> int | None:
    """The step of the checkpoint to go on from; None for the newest one.

    A run goes back to `checkpoint.resume_from` once: when the same command is run again, the data
    of the newest checkpoint tells that it has done so.
    """
    step = run.checkpoint.resume_from
    return None if not step or newest.get("resumed_from") == step else step


def left_out(run: Run, before: list, start: int, leave_out_to: int) -> tuple:
    """The (first, last) pairs of batches that the run leaves out from its step `start` on.

    Args:
      before: the pairs that the checkpoint of that step was trained with.
      leave_out_to: leaves out the batches from the next one to this one too, if it is not -1.

    Raises: ConfigError for a pair with batches that the run has been trained on.
    """
    kept = tuple((first, last) for first, last in before)
    done = batches.number(start, kept)
    added = tuple(pair for pair in run.data.skip_batches if pair not in kept)
    for first, last in added:
        if first < done:
            raise ConfigError(
                f"config.data.skip_batches has ({first}, {last}), but the run at step {start} has "
                f"been trained on the batches before {done}; begin there, or set "
                "checkpoint.resume_from to an earlier checkpoint"
            )
    return kept + added + (((done, leave_out_to),) if leave_out_to >= done else ())


@contextlib.contextmanager
def naming_differences(
    workdir: pathlib.Path, run: Run, mismatch: type[Exception]
) -> Iterator[None]:
    """Turns a `mismatch`, for a checkpoint with other parameters or moments, into a ConfigError
    that names the fields in which the run differs from the one in the workdir."""
    try:
        yield
    except mismatch as error:
        before = reading.load_json(workdir).to_dict()
        named = comparison.differences(run.model, resolved.model_in(before)) or [
            f"{key} is {new!r}, not {old!r}"
            for key, (old, new) in _changed(before, run.config).items()
        ]
        raise ConfigError(
            f"the run in --workdir={workdir} has another model or optimizer: "
            f"{'; '.join(named) or error}; set these as they were, or give another --workdir"
        ) from error


def changed_text(before: dict[str, str], now: dict[str, str], run: Run) -> list[str]:
    """Compares the hashes of the tokenized splits with those saved in a checkpoint; returns a line
    for each split with other tokens.

    Raises: ConfigError if there are any and `data.other_text` does not allow it.
    """
    changed = [split for split, digest in now.items() if before.get(split, digest) != digest]
    if changed and not run.data.other_text:
        name, _, split = changed[0].rpartition("/")  # a mixture's are SOURCE/SPLIT
        key = f"config.data.mixture, source {name}:" if name else "config.data.source="
        raise ConfigError(
            f"{key}{run.data.named_sources.get(name, '')!r} (tokenizer {run.data.tokenizer!r}) "
            f"holds another {split} text than when the run in --workdir began (tokens or labels "
            "differ); restore the files, set config.data.other_text=True, or give another --workdir"
        )
    return [f"the {split} text is another" for split in changed]


def changed_versions(before: dict[str, str]) -> list[str]:
    """A line for each program whose version is not that of `before`: the numbers may differ."""
    now = versions()
    olds = {name: before.get(name, "unknown") for name in now}
    return [f"{name}: {old} -> {now[name]}" for name, old in olds.items() if now[name] != old]


def versions() -> dict[str, str]:
    """The versions of the programs that a run's numbers depend on."""
    jax_and_own = {"jax": jax.__version__, "moe_jax": moe_jax.__version__}
    return {"python": platform.python_version(), **jax_and_own}


def commit() -> str:
    """The commit of the checkout that this program runs from, with "-dirty" if files of the package
    differ; "" without a checkout or git."""
    root = pathlib.Path(moe_jax.__file__).parents[1]
    if not (root / ".git").exists():  # as in a folder of installed packages
        return ""
    name = _git(root, "describe", "--always", "--exclude=*")
    changed = _git(root, "status", "--porcelain", "--untracked-files=no", "--", "moe_jax")
    return f"{name}-dirty" if name and changed else name


def _git(root: pathlib.Path, *arguments: str) -> str:
    """What git says; "" without git."""
    command = ["git", "-C", str(root), *arguments]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return asked.stdout.strip()


def fixed_keys(kind: type[Section] = Run, around: bool = False) -> set[str]:
    """The keys that may not change in a resumed run: they decide which text a step sees, or whether
    routing is learned at all.

    `around` is the default for keys of `kind`, inherited from the enclosing section.
    """
    found, default = set(), around if kind.fixed is None else kind.fixed
    for field in dataclasses.fields(kind):
        name = f"{kind.path}.{field.name}".removeprefix(".")
        fixed = field.metadata.get("fixed")
        fixed = default if fixed is None else fixed
        if section := section_of(field):
            found |= fixed_keys(section, default)
        elif isinstance(fixed, tuple):
            found |= {f"{name}.{inner}" for inner in fixed}
        elif fixed:
            found.add(name)
    return found
