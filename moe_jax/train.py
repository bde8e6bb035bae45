"""One training run, from config to result: read this page top to bottom."""

import contextlib
import dataclasses
import fcntl
import functools
import json
import pathlib
import platform
import time

import jax
import numpy as np
from ml_collections import ConfigDict

import moe_jax
from moe_jax import config as configs
from moe_jax import init, model, stores
from moe_jax.analysis import routing, similarity
from moe_jax.config import environment
from moe_jax.config.sections import Data, Evaluation, Objective
from moe_jax.data import pipeline, tokenizers
from moe_jax.evaluation import generate, perplexity
from moe_jax.ops import verify
from moe_jax.parallel import distributed, sharding
from moe_jax.parallel import mesh as meshes
from moe_jax.training import balancing, checkpoint, flops, loop, metrics, optimizer, step
from moe_jax.training.state import TrainState


def run(config: ConfigDict, workdir: pathlib.Path) -> dict:
    """Trains as `config` says, or goes on where the run in `workdir` stopped; returns its result.

    Writes config.json, metrics.jsonl, tensorboard/, checkpoints/ and at the end result.json.
    Several processes (`parallel.distributed`) run this page together, each on its devices and its
    rows of a batch, and process 0 writes; the workdir is the same folder for all of them.

    Raises: ConfigError before anything is written; SystemExit as `training.loop.run`.
    """
    began = time.monotonic()
    try:
        distributed.check_equal("the config", config.to_json(sort_keys=True) + str(workdir))
    except ValueError as error:
        raise configs.ConfigError(str(error)) from None
    together = functools.partial(distributed.together, configs.ConfigError)
    settings = configs.resolve(config)
    with together():
        environment.validate_environment(settings, jax.device_count())
    model_config, data = settings.model, settings.data
    training, evaluation = settings.training, settings.evaluation
    cache = pipeline.cache_folder(data.cache_dir)
    # Runs of a sweep that differ in their parameters only share one compilation.
    jax.config.update("jax_compilation_cache_dir", str(cache / "compiled"))

    # mesh -----------------------------------------------------------------------------------
    mesh = meshes.make(vars(settings.mesh))
    on_mesh = functools.partial(meshes.under, mesh)
    batch_sharding = jax.NamedSharding(mesh, sharding.BATCH)
    tx = optimizer.adamw(settings.optimizer, training.num_steps)
    create_state = functools.partial(
        TrainState.create,
        optimizer=tx,
        router_state=balancing.initial(model_config, settings.balance),
    )
    shapes = jax.eval_shape(
        lambda: create_state(model.init(model_config, jax.random.key(settings.seed)))
    )
    try:
        abstract = sharding.abstract(shapes, mesh)
    except ValueError as error:
        raise configs.ConfigError(str(error)) from error
    try:
        optimizer.check_paths(settings.optimizer, shapes.params)
    except ValueError as error:
        raise configs.ConfigError(f"config.{error}") from None
    state_shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)

    # kernels --------------------------------------------------------------------------------
    try:
        for op, implementation in model_config.implementations.items():
            verify.verify(op, implementation)
    except ValueError as error:
        raise configs.ConfigError(f"config.model: {error}") from None

    # teacher --------------------------------------------------------------------------------
    teacher, teacher_params = _teacher(settings.objective, model_config, mesh)

    # data -----------------------------------------------------------------------------------
    tokenizer = tokenizers.load(data.tokenizer)
    open_corpora = functools.partial(_open_corpora, data, tokenizer, cache)
    train_text, held_out = distributed.first_alone(open_corpora, configs.ConfigError)

    # state ----------------------------------------------------------------------------------
    try:
        restored = checkpoint.restore_latest(workdir / "checkpoints", abstract)
    except ValueError as error:
        raise configs.ConfigError(f"{error}; give another --workdir or config") from error
    if restored is None:
        start, plan = 0, init.plan_of(settings)
        state = on_mesh(jax.jit(create_state, out_shardings=state_shardings))(
            init.parameters(settings, mesh, plan)
        )
        if settings.init.upcycle.optimizer_state == "copy":
            opt_state = init.optimizer_state(settings, mesh, state.opt_state, plan)
            state = state.replace(opt_state=opt_state)
    else:
        start, state = restored.step, restored.state
        changed = environment.changes(restored.config, config)
        distributed.say(f"going on from step {start}", *changed)
    with together():
        lock = _lock(workdir) if distributed.is_first() else contextlib.nullcontext()
    if distributed.is_first():
        configs.save_json(config, workdir)
    routers_at_start = _routers_at_start(workdir, start, state.params, model_config)
    batches = pipeline.feed(
        pipeline.batches,
        train_text,
        batch_sharding,
        batch_size=training.batch_size,
        sequence_length=data.sequence_length,
        seed=settings.seed,
        start_step=start,
    )

    # step -----------------------------------------------------------------------------------
    compiled = step.jitted(settings, tx, state_shardings, mesh, teacher)

    def train_step(state: TrainState, batch: step.Batch):
        return compiled(state, batch, *([] if teacher is None else [teacher_params]))

    eval_config = model_config
    if evaluation.num_experts_per_tok:
        eval_config = dataclasses.replace(
            model_config, num_experts_per_tok=evaluation.num_experts_per_tok
        )
    eval_step = on_mesh(
        jax.jit(
            perplexity.make_eval_step(eval_config, len(held_out.labels)),
            out_shardings=jax.NamedSharding(mesh, jax.P()),
        )
    )

    def evaluate(params: dict) -> perplexity.Evaluation:
        held_out_batches = pipeline.feed(
            pipeline.evaluation_batches,
            held_out,
            batch_sharding,
            batch_size=evaluation.batch_size,
            sequence_length=data.sequence_length,
            max_batches=evaluation.max_batches,
        )
        return perplexity.evaluate(eval_step, params, held_out_batches, held_out.bytes_per_token)

    # loop -----------------------------------------------------------------------------------
    flops_per_token = flops.model_flops(model_config, data.sequence_length)
    if teacher is not None:  # forward alone
        flops_per_token += flops.model_flops(teacher, data.sequence_length) / 3
    tokens_per_step = training.batch_size * data.sequence_length
    router_health = functools.partial(
        routing.health, kind=model_config.router, capacity_factor=model_config.capacity_factor
    )
    if model_config.router == "forced_balance":
        distributed.say("router=forced_balance: for timing only, no routing is learned")
    with metrics.writer(workdir, resume_step=start) as writer:
        state, final = loop.run(
            state,
            start,
            batches,
            settings,
            loop.Parts(
                train_step=on_mesh(train_step),
                evaluate=evaluate,
                save=functools.partial(_save, workdir, config),
                learning_rate=optimizer.schedule(settings.optimizer, training.num_steps),
                writer=writer,
                tokens_per_step=tokens_per_step,
                model_flops_per_token=flops_per_token,
                analytic_flops_per_token=flops.analytic_flops(model_config, data.sequence_length),
                peak_flops=flops.peak_flops(jax.devices()[0]) * jax.device_count(),
                router_health=router_health,
                largest=distributed.Largest(mesh),
            ),
        )

    # result ---------------------------------------------------------------------------------
    counts_LE = final.tokens_per_expert_LE
    health = {} if counts_LE is None else router_health(counts_LE)
    parent = init.lineage(settings.init.source)
    total, active = model.count_parameters(model_config)
    result = {
        "steps": training.num_steps,
        "tokens": training.num_steps * tokens_per_step,
        "training_flops": training.num_steps * tokens_per_step * flops_per_token,
        "parent_tokens": parent.tokens,
        "parent_training_flops": parent.training_flops,
        **final.row(),
        "byte_unigram_bits": held_out.byte_unigram_bits,
        "tokens_per_expert": health.get("tokens_per_expert"),
        "effective_experts": health.get("effective_experts"),
        "expert_similarity": similarity.of_layers(state.params, model_config),
        "router_drift": [
            round(row.distance, 5)
            for row in similarity.router_drift(
                routers_at_start, similarity.routers(state.params, model_config)
            )
        ],
        "router": model_config.router if model_config.num_experts else "",
        "samples": _samples(state.params, eval_config, tokenizer, evaluation, settings.seed),
        "seconds": round(time.monotonic() - began, 1),
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "moe_jax": moe_jax.__version__,
        },
        "device": f"{jax.devices()[0].device_kind} x {jax.device_count()}",
        "parameters": total,
        "active_parameters": active,
    }
    if distributed.is_first():
        unfinished = workdir / "result.json.tmp"
        unfinished.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
        unfinished.replace(workdir / "result.json")
        lock.close()
    return result


def _open_corpora(
    data: Data, tokenizer: tokenizers.Tokenizer, cache: pathlib.Path
) -> list[pipeline.TokenizedCorpus]:
    """The texts to train on and to evaluate on."""
    try:
        return [
            pipeline.open_corpus(
                data.source,
                split,
                tokenizer,
                validation_fraction=data.validation_fraction,
                cache=cache,
            )
            for split in ("train", "validation")
        ]
    except (ValueError, OSError) as error:
        raise configs.ConfigError(" ".join(str(error).split())) from error


def _teacher(objective: Objective, model_config: model.ModelConfig, mesh) -> tuple:
    """The model to distil from and its parameters; None and None without distillation."""
    section = objective.distillation
    if not section.coefficient:
        return None, None
    try:
        teacher, params = stores.load(pathlib.Path(section.source), mesh)
    except (ValueError, FileNotFoundError) as error:
        raise configs.ConfigError(f"config.objective.distillation.source: {error}") from error
    if teacher.vocab_size != model_config.vocab_size:
        raise configs.ConfigError(
            f"config.objective.distillation.source={section.source}: a teacher of "
            f"{teacher.vocab_size} tokens cannot teach a model of {model_config.vocab_size}"
        )
    return teacher, params


def _lock(workdir: pathlib.Path):
    """Makes the workdir; keeps a second run out of it for as long as the file is open."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = open(workdir / ".lock", "w")
    except OSError as error:
        raise configs.ConfigError(f"--workdir={workdir} cannot be made: {error}") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise configs.ConfigError(
            f"--workdir={workdir}: another run is using it; wait or choose another"
        ) from None
    return lock


def _routers_at_start(workdir: pathlib.Path, start: int, params: dict, model_config) -> dict:
    """The routers' kernels before the first step, kept in the workdir for a run that goes on."""
    path = workdir / "routers_at_start.npz"
    if not model_config.num_experts:
        return {}
    if start == 0:
        kernels = similarity.routers(params, model_config)
        if distributed.is_first():
            np.savez(path, **{str(layer): kernel for layer, kernel in kernels.items()})
        return kernels
    with np.load(path, allow_pickle=False) as kernels:
        return {int(layer): kernel for layer, kernel in kernels.items()}


def _save(workdir: pathlib.Path, config: ConfigDict, at: int, state: TrainState) -> None:
    checkpoint.save(
        workdir / "checkpoints",
        at,
        state,
        data={"step": at},
        config=config.to_dict(),
        keep=config.checkpoint.keep,
    )


def _samples(
    params: dict, model_config, tokenizer, evaluation: Evaluation, seed: int
) -> list[dict[str, str]]:
    """Continuations of `evaluation.prompts`, on one device."""
    prompts = list(evaluation.prompts)
    if not prompts:
        return []
    continuations = generate.generate(
        distributed.whole(params),
        model_config,
        [tokenizer.prompt(prompt) for prompt in prompts],
        num_tokens=evaluation.continuation_tokens,
        temperature=0.7,
        key=jax.random.key(seed),
    )
    return [
        {"prompt": prompt, "continuation": tokenizer.decode(ids)}
        for prompt, ids in zip(prompts, continuations, strict=True)
    ]
