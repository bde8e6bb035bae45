"""One training run, from config to result: read this page top to bottom."""

import fcntl
import functools
import json
import pathlib
import platform
import time
from typing import Any

import jax
import numpy as np

import moe_jax
from moe_jax import config as configs
from moe_jax import files, init, model, stores, strict_json, untrusted
from moe_jax.analysis import similarity
from moe_jax.config import checks, environment
from moe_jax.data import batches, prepare, sources, tokenizers
from moe_jax.data.cache import DATASETS, cache_folder
from moe_jax.data.corpus import TokenizedCorpus
from moe_jax.evaluation import evaluators
from moe_jax.hf import folders
from moe_jax.model.router import ROUTERS
from moe_jax.ops import verify
from moe_jax.parallel import distributed, sharding
from moe_jax.parallel import mesh as meshes
from moe_jax.training import balance, checkpoint, flops, loop, metrics, objective, optimizer, step
from moe_jax.training.state import TrainState


def run(settings: configs.Run, workdir: pathlib.Path) -> dict:
    """Trains with these settings, or resumes the run in `workdir`; returns the run's result.

    Writes config.json, metrics.jsonl, tensorboard/, checkpoints/ and, at the end, result.json.
    Several processes (`parallel.distributed`) execute this function together, each on its devices
    and its rows of a batch, and process 0 writes; all of them use the same workdir.

    Raises: ConfigError before anything is written; SystemExit like `training.loop.run`.
    """
    began = time.monotonic()
    with checks.refusing():
        cache = cache_folder(settings.data.cache_dir)
        stored = settings.config.to_json(sort_keys=True)
        distributed.check_equal("the config", stored + str(workdir))
    together = functools.partial(distributed.together, configs.ConfigError)
    with together():
        goes_on = bool(checkpoint.steps(workdir / "checkpoints"))
        environment.validate_environment(settings, jax.device_count(), goes_on=goes_on)
    evaluators.intervals(settings.evaluation)  # refuses an evaluator that is not in the table
    training, length = settings.training, settings.data.sequence_length
    # Runs of a sweep that differ only in the values of their parameters share one compilation.
    jax.config.update("jax_compilation_cache_dir", str(cache / "compiled"))

    # mesh -----------------------------------------------------------------------------------
    mesh = meshes.make(vars(settings.mesh))
    on_mesh = functools.partial(meshes.under, mesh)
    tx = optimizer.adamw(settings.optimizer, training.num_steps)
    fresh = balance.initial(settings.model, settings.balance)
    create_state = functools.partial(TrainState.create, optimizer=tx, router_state=fresh)
    shapes = jax.eval_shape(
        lambda: create_state(model.init(settings.model, jax.random.key(settings.seed)))
    )
    with checks.refusing():
        abstract = sharding.abstract(shapes, mesh)
    with checks.refusing("config."):
        optimizer.check_paths(settings.optimizer, shapes.params)
    state_shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)

    # kernels --------------------------------------------------------------------------------
    with checks.refusing("config.model: "):
        for op, implementation in settings.model.implementations.items():
            verify.verify(op, implementation)

    # objective ------------------------------------------------------------------------------
    frozen, frozen_params = _frozen_models(settings, mesh)

    # data -----------------------------------------------------------------------------------
    tokenizer = tokenizers.load(settings.data.tokenizer)
    open_corpora = functools.partial(_open_corpora, settings.data, tokenizer, cache)
    train_text, held_out = distributed.first_alone(open_corpora, configs.ConfigError)
    digests = {"train": train_text.digest, "validation": held_out.digest}
    with checks.refusing():
        distributed.check_equal("the text of config.data.source", json.dumps(digests))

    # state ----------------------------------------------------------------------------------
    named = environment.naming_differences(workdir, settings, checkpoint.Mismatch)
    with checks.refusing(), named:
        restored = checkpoint.restore_latest(workdir / "checkpoints", abstract)
    if restored is None:
        start, plan = 0, init.plan_of(settings)
        kept: dict[str, Any] = {"lineage": init.lineage(settings.init.parents), "skipped_steps": 0}
        state = on_mesh(jax.jit(create_state, out_shardings=state_shardings))(
            init.parameters(settings, mesh, plan)
        )
        if plan and settings.init.upcycle.optimizer_state == "copy":
            opt_state = init.optimizer_state(settings, mesh, state.opt_state, plan)
            state = state.replace(opt_state=opt_state)
    else:
        start, state = restored.step, restored.state
        kept = {"lineage": init.NO_LINEAGE, "skipped_steps": 0} | restored.data
        with together():
            environment.check_step(start, settings)
            changed = environment.changes(restored.config, settings.config)
            environment.check_text(restored.data.get("text", {}), digests, settings)
        distributed.say(f"going on from step {start}", *changed)
    with together():
        lock = _lock(workdir) if distributed.is_first() else None
    if distributed.is_first():
        configs.save_json(settings.config, workdir)
        init.keep_from_parents(settings, workdir)
        checkpoint.remove_unfinished(workdir / "checkpoints")
    if settings.data.source == "embedded" and any(map(folders.is_folder, settings.init.parents)):
        distributed.say("config.data.source='embedded' is software help; set it to your own text")
    text = batches.feed(
        batches.batches,
        train_text,
        jax.NamedSharding(mesh, sharding.BATCH),
        batch_size=training.batch_size,
        sequence_length=length,
        seed=settings.seed,
        start_step=start,
    )

    # step -----------------------------------------------------------------------------------
    compiled = step.jitted(settings, tx, state_shardings, mesh, frozen)

    def train_step(state: TrainState, batch: batches.Batch):
        return compiled(state, batch, *([frozen_params] if frozen else []))

    # loop -----------------------------------------------------------------------------------
    context = evaluators.Context(
        run=settings,
        mesh=mesh,
        held_out=held_out,
        tokenizer=tokenizer,
        routers_at_start=_routers_at_start(workdir, start, state.params, settings.model),
    )

    sound = frozenset({start} if restored else ())

    def save(at: int, state: TrainState, skipped: int) -> None:
        nonlocal sound
        sound = checkpoint.save(
            *(workdir / "checkpoints", at, state),
            data={**kept, "text": digests, "skipped_steps": skipped},
            config=settings.config.to_dict(),
            keep=settings.checkpoint.keep,
            sound=sound,
        )

    tokens_per_step = training.batch_size * length
    flops_per_token = flops.model_flops(settings.model, length)
    # A frozen model has only a forward pass, a third of the FLOPs.
    flops_per_token += sum(flops.model_flops(config, length) / 3 for config in frozen.values())
    if not ROUTERS[settings.model.router].learned:
        distributed.say(f"router={settings.model.router}: for timing only, no routing is learned")
    with metrics.writer(workdir, resume_step=start) as write_row:
        parts = loop.Parts(
            train_step=on_mesh(train_step),
            evaluators=evaluators.schedule(context),
            save=save,
            write=write_row,
            tokens_per_step=tokens_per_step,
            model_flops_per_token=flops_per_token,
            analytic_flops_per_token=flops.analytic_flops(settings.model, length),
            peak_flops=flops.peak_flops(jax.devices()[0]) * jax.device_count(),
            largest=distributed.Largest(mesh),
        )
        state, results = loop.run(state, start, text, settings, parts, kept["skipped_steps"])

    # result ---------------------------------------------------------------------------------
    seconds = round(time.monotonic() - began, 1)
    result = _facts(settings, flops_per_token) | results | {"seconds": seconds}
    result["parent_tokens"] = kept["lineage"]["tokens"]
    result["parent_training_flops"] = kept["lineage"]["training_flops"]
    if lock:
        shown = strict_json.text(result, indent=1)
        files.write_text(workdir / "result.json", shown + "\n")
        lock.close()
    return result


def _facts(settings: configs.Run, flops_per_token: float) -> dict:
    """The facts of a run that its config and this machine decide."""
    training = settings.training
    tokens = training.last_step * training.batch_size * settings.data.sequence_length
    total, active = model.count_parameters(settings.model)
    versions = {"jax": jax.__version__, "moe_jax": moe_jax.__version__}
    return {
        "steps": training.last_step,
        "tokens": tokens,
        "training_flops": tokens * flops_per_token,
        "router": settings.model.router if settings.model.num_experts else "",
        "versions": {"python": platform.python_version(), **versions},
        "device": f"{jax.devices()[0].device_kind} x {jax.device_count()}",
        "parameters": total,
        "active_parameters": active,
    }


def _open_corpora(
    data: configs.Data, tokenizer: tokenizers.Tokenizer, cache: pathlib.Path
) -> list[TokenizedCorpus]:
    """The corpora for training and for evaluation."""
    open_split = functools.partial(
        prepare.open_corpus,
        validation_fraction=data.validation_fraction,
        cache=cache,
        max_line=data.max_line,
    )
    with checks.refusing():
        distributed.say(sources.describe(data.source, cache / DATASETS))
        return [open_split(data.source, split, tokenizer) for split in ("train", "validation")]


def _frozen_models(settings: configs.Run, mesh: jax.sharding.Mesh) -> tuple[dict, dict]:
    """The configs and the parameters, by name, of the models besides the trained one."""
    sources = objective.choose(settings.objective.name).frozen_models(settings.objective)
    frozen, params = {}, {}
    for name, source in sources.items():
        with checks.refusing(f"config.objective, {name}: "):
            frozen[name], params[name] = stores.load(pathlib.Path(source), mesh)
            frozen[name].check_rows(settings.data.sequence_length)
        vocab_size = frozen[name].vocab_size
        if vocab_size != settings.model.vocab_size:
            raise configs.ConfigError(
                f"config.objective, {name} {source}: a model of {vocab_size} tokens does not fit "
                f"one of {settings.model.vocab_size}"
            )
    return frozen, params


def _lock(workdir: pathlib.Path):
    """Creates the workdir, and locks it against a second run until the file is closed."""
    try:
        untrusted.check_folder(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        lock = open(workdir / untrusted.LOCK, "a")  # a hard link keeps its content
    except (OSError, ValueError) as error:
        raise configs.ConfigError(f"--workdir={workdir} cannot be used: {error}") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise configs.ConfigError(
            f"--workdir={workdir}: another run is using it; wait or choose another"
        ) from None
    return lock


def _routers_at_start(workdir: pathlib.Path, start: int, params: dict, model_config) -> dict:
    """The routers' kernels before the first step, kept in the workdir for resumed runs."""
    path = workdir / "routers_at_start.npz"
    if not model_config.num_experts:
        return {}
    kernels = similarity.routers(params, model_config)
    shapes = {layer: kernel.shape for layer, kernel in kernels.items()}
    try:
        if start > 0:
            with np.load(path, allow_pickle=False) as arrays:
                kept = {int(layer): kernel for layer, kernel in arrays.items()}
            if {layer: kernel.shape for layer, kernel in kept.items()} == shapes:
                return kept
            raise ValueError("its kernels are of another model")
    except Exception:  # zip archives and arrays that are damaged raise many types
        distributed.say(f"{path} is missing or damaged: router_drift counts from this step on")
    if distributed.is_first():
        np.savez(path, **dict[str, Any]({str(layer): x for layer, x in kernels.items()}))
    return kernels
