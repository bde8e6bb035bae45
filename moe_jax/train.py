"""One training run, from config to result: read this page top to bottom."""

import contextlib
import errno
import fcntl
import functools
import os
import pathlib
import time
from typing import Any

import jax
import numpy as np

from moe_jax import command_line, files, init, model, stores, strict_json, tree, untrusted
from moe_jax import config as configs
from moe_jax.analysis import similarity
from moe_jax.config import checks, environment
from moe_jax.data import batches, tokenizers
from moe_jax.data.cache import cache_folder
from moe_jax.evaluation import evaluators
from moe_jax.model.router import ROUTERS
from moe_jax.ops import verify
from moe_jax.parallel import distributed, sharding
from moe_jax.parallel import mesh as meshes
from moe_jax.training import (
    backends,
    balance,
    checkpoint,
    flops,
    guards,
    library_threads,
    loop,
    lora,
    metrics,
    objective,
    optimizer,
    ownership,
    profiling,
    pulse,
    saving,
    step,
)
from moe_jax.training import text as texts
from moe_jax.training.state import TrainState

# A checkpoint keeps these values besides the state; here they are as before the first step.
NOTHING_KEPT = {
    "lineage": init.NO_LINEAGE,
    "skipped_steps": 0,
    "device_seconds": 0.0,
    "spent": {},
    "left_out": [],
    "losses": {},
}
# A run goes on from a checkpoint that has all of these; one that had no guards has no history.
RESTORING: dict[str, Any] = {
    "needed": ("lineage", "skipped_steps", "left_out", "losses", "text", "versions"),
    "optional": "history/",
}
WRITTEN = ("config.json", "metrics.jsonl", "result.json", "heartbeat.json", "routers_at_start.npz")
OWN_FILES = [
    f"{name}{end}"
    for name in (*WRITTEN, ownership.NOTE)
    for end in ("", ".tmp")  # files.whole_file
]


def _keep_compiled(folder: pathlib.Path) -> None:
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # it says where, as in all programs of jax
        jax.config.update("jax_compilation_cache_dir", str(folder))


def run(settings: configs.Run, workdir: pathlib.Path, *, leave_out_to: int = -1) -> dict:
    """Trains with these settings, or resumes the run in `workdir`; returns the run's result.

    After `guards.Rewind`, `leave_out_to` is the last batch to leave out from the checkpoint on.

    Writes config.json, metrics.jsonl, the files of training.log_to, checkpoints/ and result.json.
    Several processes (`parallel.distributed`) execute this function together, each on its devices
    and its rows of a batch, and process 0 writes; all of them use the same workdir.

    Raises: ConfigError before anything is written; SaveError; and what `training.loop.run` raises.
    """
    began, made_by = time.monotonic(), _made_by()
    with checks.refusing():
        cache = cache_folder(settings.data.cache_dir)
        stored = settings.config.to_json(sort_keys=True)
        distributed.check_equal("the config", stored + str(workdir))
        directory = configs.checkpoints_of(workdir, settings.checkpoint.directory)
    together = functools.partial(distributed.together, configs.ConfigError)
    with together():
        owned = ownership.Ownership(workdir, directory, settings.config)
        goes_on = owned.check()
        environment.validate_environment(settings, jax.device_count(), goes_on=goes_on)
        backends.check(settings.training.log_to)
    evaluators.check(settings)
    # Runs of a sweep that differ only in the values of their parameters share one compilation.
    _keep_compiled(cache / "compiled")

    # mesh -----------------------------------------------------------------------------------
    mesh = meshes.make(vars(settings.mesh))
    on_mesh = functools.partial(meshes.under, mesh)
    random = functools.partial(model.init, settings.model, jax.random.key(settings.seed))
    with checks.refusing():
        shapes = jax.eval_shape(lambda: _with_pairs(settings, random()))
        sharding.abstract(shapes, mesh)
    with checks.refusing("config."):
        optimizer.check_paths(settings.optimizer, shapes)

    # kernels --------------------------------------------------------------------------------
    with checks.refusing("config.model: "):
        for op, implementation in settings.model.implementations.items():
            verify.verify(op, implementation)

    # objective ------------------------------------------------------------------------------
    frozen, frozen_params = _frozen_models(settings, mesh)

    # data -----------------------------------------------------------------------------------
    tokenizer = tokenizers.load(settings.data.tokenizer)
    open_text = functools.partial(texts.open_text, settings, tokenizer, cache)
    with checks.refusing():
        text = distributed.first_alone(open_text, configs.ConfigError)
        distributed.check_equal("the text of config.data", text.facts)
    settings = texts.with_steps(settings, text)
    text, frozen, frozen_params = texts.with_reference(
        *(settings, text, mesh, cache, frozen, frozen_params)
    )

    # state ----------------------------------------------------------------------------------
    tx = optimizer.adamw(settings.optimizer, settings.training.num_steps)
    create_state = functools.partial(_create_state, settings, tx)
    abstract = sharding.abstract(jax.eval_shape(lambda: create_state(random())), mesh)
    state_shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    trained = _trained(settings, abstract)
    named = environment.naming_differences(workdir, settings, checkpoint.Mismatch)
    with checks.refusing(), named:
        newest = distributed.of_first(checkpoint.newest_data(directory))
        at = environment.resume_step(settings, newest)
        restored = checkpoint.restore_latest(directory, abstract, step=at, **RESTORING)
    kept: dict[str, Any] = dict(restored.data if restored else NOTHING_KEPT)
    if restored is None:
        start, kept["lineage"] = 0, init.lineage(settings.init.sources)
        create = on_mesh(jax.jit(create_state, out_shardings=state_shardings))
        state = _first_state(settings, mesh, create)
    else:
        start, state = restored.step, _with_history(restored.state, settings, state_shardings)
        with together():
            environment.check_step(start, settings)
            before = restored.config, restored.data
            changed = environment.changes_since(*before, settings, text.digests)
        distributed.say(f"going on from step {start}", *changed)
    with together():
        kept["left_out"] = environment.left_out(settings, kept["left_out"], start, leave_out_to)
        rows = texts.rows(text, settings, kept, start)
        room = functools.partial(saving.check_room, directory, saving.num_bytes(abstract))
        if not workdir.exists():
            room()
        lock = _lock(workdir, owned.claim, bool(restored)) if distributed.is_first() else None
        room()  # when what a killed save had left is removed
    if lock:
        if at is not None:
            checkpoint.set_aside_after(directory, at)
        configs.save_json(settings.config, workdir)
        init.keep_from_parents(settings, tokenizer, workdir)
    fed = _feed(settings, mesh, text, rows.plan, start, kept["left_out"])

    # step -----------------------------------------------------------------------------------
    compiled = step.jitted(settings, tx, state_shardings, mesh, frozen)
    extra = [frozen_params] if frozen else []
    train_step = profiling.traced(compiled, extra, settings.profile, workdir, start)

    # loop -----------------------------------------------------------------------------------
    routers = _routers_at_start(workdir, start, state.params, settings.model)
    parent = functools.partial(init.dense_parent, settings, mesh, kept["lineage"]["parents"])
    context = evaluators.Context(
        *(settings, mesh, text.held_out, tokenizer, routers, parent, text.pairs, text.test)
    )
    saver = saving.Saver(directory, settings, {start} if restored else (), kept["losses"], owned)
    kept |= {"text": text.digests, "mixture": rows.to_json(), "versions": environment.versions()}
    kept |= {"skipped_records": text.skipped, "resumed_from": settings.checkpoint.resume_from}
    beat = pulse.Pulse(settings.guards, workdir, began, kept.get("spent"))

    def save(at: int, state: TrainState, skipped: int) -> None:
        spent = {"spent": beat.clock.seconds(), "device_seconds": _device_seconds(kept, began)}
        saver.save(at, state, {**kept, **spent, "skipped_steps": skipped})
        write_row.check()

    def write(row: dict) -> None:
        row |= rows.row(row["step"]) if "validation" in row else {}
        write_row(row | _skipped_records(kept["skipped_records"]))
        if "validation" in row:
            saver.evaluated(row["step"], float(row["validation"]["loss"]))

    if not ROUTERS[settings.model.router].learned:
        distributed.say(f"router={settings.model.router}: for timing only, no routing is learned")
    with (
        contextlib.closing(lock) if lock else contextlib.nullcontext(),
        contextlib.closing(fed),
        library_threads.quiet(),
        metrics.writer(workdir, resume_step=start, log_to=settings.training.log_to) as write_row,
        saving.finishing(saver),
    ):
        parts = loop.Parts(
            train_step=on_mesh(train_step),
            evaluators=evaluators.schedule(context),
            save=save,
            saved=lambda wait: saver.wait() if wait else saver.check(),
            write=write,
            costs=flops.costs(settings, frozen.values()),
            batch_of=lambda at: batches.number(at - 1, kept["left_out"]),
            largest=distributed.Largest(mesh),
            pulse=beat,
            merged=lora.merging(settings.lora, mesh),
        )
        state, results = loop.run(state, start, fed, settings, parts, kept["skipped_steps"])

        # result -----------------------------------------------------------------------------
        result = _facts(settings, parts.costs, kept, began) | trained | made_by | results
        result |= rows.row(settings.training.last_step)
        if lock:
            files.write_text(workdir / "result.json", strict_json.text(result, indent=1) + "\n")
    return result


def _skipped_records(by_split: dict) -> dict:
    """A value for a row of metrics.jsonl, if records could not be used and were skipped."""
    counts = {split: sum(by_reason.values()) for split, by_reason in by_split.items()}
    return {"skipped_records": counts} if any(counts.values()) else {}


def _with_pairs(settings: configs.Run, params: dict) -> dict:
    """The parameters with the pairs of LoRA, if the run has any."""
    key = tree.fold_in(jax.random.key(settings.seed), "lora")
    return lora.added(params, settings.lora, key)


def _create_state(settings: configs.Run, tx, params: dict) -> TrainState:
    """The state before the first step."""
    return TrainState.create(
        _with_pairs(settings, params),
        optimizer=tx,
        router_state=balance.initial(settings.model, settings.balance),
        history=guards.history(settings.guards),
    )


def _trained(settings: configs.Run, state: TrainState) -> dict:
    """The sizes of what the optimizer updates and keeps, which are also printed."""
    part, _ = optimizer.split(state.params, settings.optimizer.frozen)
    total, trained = (sum(leaf.size for leaf in jax.tree.leaves(x)) for x in (state.params, part))
    num_bytes = saving.num_bytes(state.opt_state)
    distributed.say(
        f"trains {trained:,} of {total:,} parameters; the optimizer state has {num_bytes:,} bytes"
    )
    return {"trained_parameters": trained, "optimizer_state_bytes": num_bytes}


def _made_by() -> dict:
    """The command and the commit, as they are when the run starts."""
    return {"command": command_line.this_command(), "commit": environment.commit()}


def _device_seconds(kept: dict, began: float) -> float | None:
    """The wall time of this process and of those that it resumes, times their devices; None if a
    checkpoint of an older version does not say it. Work that a crash lost is not counted."""
    earlier = kept.get("device_seconds")
    now = (time.monotonic() - began) * jax.device_count()
    return None if earlier is None else round(earlier + now, 1)


def _facts(settings: configs.Run, costs: flops.Costs, kept: dict, began: float) -> dict:
    """The facts of a run that its config, its parents and this machine decide."""
    lineage = kept["lineage"]
    steps = settings.training.last_step
    tokens = steps * costs.tokens_per_step
    total, active = model.count_parameters(settings.model)
    return {
        "steps": steps,
        "tokens": tokens,
        "training_flops": tokens * costs.model_flops_per_token,
        "parents": lineage["parents"],
        "parent_tokens": lineage["tokens"],
        "parent_training_flops": lineage["training_flops"],
        "seconds": round(time.monotonic() - began, 1),
        "device_seconds": _device_seconds(kept, began),
        "parent_device_seconds": lineage.get("device_seconds"),
        "router": settings.model.router if settings.model.num_experts else "",
        "skipped_records": kept["skipped_records"],
        "versions": environment.versions(),
        "device": f"{jax.devices()[0].device_kind} x {jax.device_count()}",
        "parameters": total,
        "active_parameters": active,
    }


def _feed(settings: configs.Run, mesh: jax.sharding.Mesh, text: texts.Text, plan, start, left_out):
    """The batches from step `start` on, on the devices of the mesh."""
    data = settings.data
    return batches.feed(
        *(batches.batches, text.train, plan),
        columns=text.columns,
        sharding=jax.NamedSharding(mesh, sharding.BATCH),
        batch_size=settings.training.batch_size,
        start_step=start,
        left_out=left_out,
        document_mask=data.document_mask,
        reset_positions=data.reset_positions,
        workers=data.workers,
    )


def _frozen_models(settings: configs.Run, mesh: jax.sharding.Mesh) -> tuple[dict, dict]:
    """The configs and the parameters, by name, of the models besides the trained one."""
    sources = objective.choose(settings.objective.name).frozen_models(settings.objective)
    frozen, params = {}, {}
    for name, source in sources.items():
        with checks.refusing(f"config.objective, {name}: "):
            frozen[name], params[name] = stores.load(
                configs.source_of(source), mesh, allow_nonfinite=settings.init.allow_nonfinite
            )
            frozen[name].check_rows(settings.data.sequence_length)
        vocab_size = frozen[name].vocab_size
        if vocab_size != settings.model.vocab_size:
            raise configs.ConfigError(
                f"config.objective, {name} {source}: a model of {vocab_size} tokens does not fit "
                f"one of {settings.model.vocab_size}"
            )
    return frozen, params


def _first_state(settings: configs.Run, mesh: jax.sharding.Mesh, create) -> TrainState:
    """The state before the first step; `create` makes it from parameters."""
    plan = init.plan_of(settings)
    state = create(init.parameters(settings, mesh, plan))
    if plan and settings.init.upcycle.optimizer_state == "copy":
        opt_state = init.optimizer_state(settings, mesh, state.opt_state, plan)
        state = state.replace(opt_state=opt_state)
    return state


def _with_history(state: TrainState, settings: configs.Run, shardings: TrainState) -> TrainState:
    """The state with an empty history of spikes if its checkpoint has none of this size."""
    if state.history is None or state.history.losses_W is not None:
        return state
    return state.replace(history=jax.device_put(guards.history(settings.guards), shardings.history))


def _lock(workdir: pathlib.Path, claim=contextlib.nullcontext, *arguments) -> contextlib.ExitStack:
    """Creates the workdir, and locks it against a second run until closed; then it enters
    `claim(*arguments)` too."""
    with contextlib.ExitStack() as held:
        with checks.refusing(f"--workdir={workdir} cannot be used: "):
            untrusted.check_folder(workdir)
            workdir.mkdir(parents=True, exist_ok=True)
            for path in (workdir / name for name in OWN_FILES):
                if path.is_dir():
                    raise IsADirectoryError(errno.EISDIR, "it is a folder", str(path))
            # A hard link keeps its content.
            lock = held.enter_context(open(workdir / untrusted.LOCK, "a"))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise configs.ConfigError(
                f"--workdir={workdir}: another run is using it; wait or choose another"
            ) from None
        except OSError:  # a file system without locks
            pass
        held.enter_context(claim(*arguments))
        return held.pop_all()


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
        with files.whole_file(path) as unfinished, open(unfinished, "wb") as file:
            np.savez(file, **dict[str, Any]({str(layer): x for layer, x in kernels.items()}))
    return kernels
