"""Real models on this machine: forward pass, train step and decoding, beside the machine's limits.

Each implementation is timed in a process of its own, because two of a real model do not fit into
memory together. The limit is timed in the same process, in turn with it.
"""

import concurrent.futures
import dataclasses
import functools
import math
import multiprocessing
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import hf, model
from moe_jax.benchmark import cases, peers
from moe_jax.benchmark import rows as benchmark
from moe_jax.config import Run
from moe_jax.evaluation import generate
from moe_jax.hf import folders
from moe_jax.parallel import allocator
from moe_jax.training import flops

NEW = 32  # the tokens after a prompt


@dataclasses.dataclass(frozen=True)
class Work:
    """`function(config, params, rows)` makes the call to time, and `limit(config, rows)` the other.

    `length` is the number of tokens that a call takes, or makes, per row.
    """

    rows: int
    length: int
    function: Callable
    limit_name: str
    limit: Callable


def _forward(config: model.ModelConfig, params: dict, rows: int) -> Callable:
    tokens_BT = _tokens(config, rows, WORKS["forward"].length)
    apply = jax.jit(model.apply, static_argnames="config")
    return lambda: apply(params, tokens_BT, config=config).logits_BTV


def _train(config: model.ModelConfig, params: dict, rows: int) -> Callable:
    settings = Run(model=dataclasses.replace(config, remat="none"))
    return cases.train_step(settings, params, rows=rows, length=WORKS["train"].length)


def _decode(config: model.ModelConfig, params: dict, rows: int) -> Callable:
    prompts = list(np.asarray(_tokens(config, rows, peers.PROMPT)))
    return lambda: generate.generate(params, config, prompts, num_tokens=NEW)


def _tokens(config: model.ModelConfig, rows: int, length: int) -> jax.Array:
    return jax.random.randint(jax.random.key(0), (rows, length), 0, config.vocab_size)


def _products(passes: int, config: model.ModelConfig, rows: int) -> Callable:
    """Large products with the FLOPs of a forward pass, or of three."""
    length = WORKS["forward"].length
    return cases.large_products(passes / 3 * flops.model_flops(config, length) * rows * length)


def _copies(config: model.ModelConfig, rows: int) -> Callable:
    """Copies, on all cores, as many bytes as decoding must read."""
    left = sum(bytes_due(config, rows, peers.PROMPT + i) for i in range(NEW))
    size = 2**26  # float32 values; larger than caches
    x, y = np.ones(size, np.float32), np.zeros(size, np.float32)
    cores = multiprocessing.cpu_count()
    pool = concurrent.futures.ThreadPoolExecutor(cores)

    def copy_part(count: int, core: int) -> None:
        part = slice(core * count // cores, (core + 1) * count // cores)
        np.copyto(y[part], x[part])

    def copy() -> None:
        whole, rest = divmod(math.ceil(left / 4), size)
        for count in [size] * whole + [rest]:
            list(pool.map(functools.partial(copy_part, count), range(cores)))

    return copy


def bytes_due(config: model.ModelConfig, rows: int, length: int) -> float:
    """The bytes that must be read to decode one token for each of the rows.

    These are all parameters but the experts that no token chose, and the keys and values of
    `length` positions. Of E experts, B tokens that choose A of them at random, each for itself,
    leave out E (1 - A/E)^B.
    """
    total, active = model.count_parameters(config)
    E, A = config.num_experts, config.active_experts
    size = jnp.dtype(config.dtype).itemsize
    experts = (total - active) * E / (E - A) if E > A else 0
    unread = experts * (1 - A / E) ** rows if E else 0
    if not config.tie_word_embeddings:
        unread += (config.vocab_size - rows) * config.hidden_size
    cached = 2 * config.num_hidden_layers * config.num_kv_heads * config.head_size * length * rows
    return size * (total - unread + cached)


WORKS = {
    "forward": Work(4, 512, _forward, "large products", functools.partial(_products, 1)),
    "train": Work(4, 512, _train, "large products", functools.partial(_products, 3)),
    **{
        f"decode_{rows}": Work(rows, NEW, _decode, "copies of the bytes due", _copies)
        for rows in (1, 8, 64)
    },
}


def run(
    models: Sequence[pathlib.Path], works: Sequence[str], repeats: int, peer: str
) -> Iterator[benchmark.Row]:
    """The rows of the works with the models, Hugging Face folders; with `peer` its rows as well.

    Raises: ValueError for a folder that is none, and for a peer that cannot run here.
    """
    configs = {folder: folders.Folder(folder).config for folder in models}
    if peer:
        peers.check(peer, "real")
    return _rows(configs, works, repeats, peer)


def _rows(configs: Mapping, works: Sequence[str], repeats: int, peer: str):
    for folder, config in configs.items():
        for name in works:
            work = WORKS[name]
            for implementation in ("moe_jax", *([peer] if peer else [])):
                seconds = _in_a_process(_measure, implementation, folder, name, repeats)
                yield benchmark.Row.of(
                    *("real", f"{folder.name} {name}", implementation, config.dtype),
                    tokens=work.rows * work.length,
                    seconds=seconds[implementation],
                    bound=work.limit_name,
                    bound_seconds=seconds[work.limit_name],
                )


def _in_a_process(function: Callable, *arguments):
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as process:
        return process.submit(function, *arguments).result()


def _measure(implementation: str, folder: pathlib.Path, name: str, repeats: int) -> dict:
    work, config = WORKS[name], folders.Folder(folder).config
    if implementation == "moe_jax":
        if name == "train":
            allocator.keep_freed_memory()  # as the command train does
        config, params = hf.load(folder)
        params = jax.tree.map(lambda x: jnp.array(x, config.dtype), params)
        function = work.function(config, params, work.rows)
    else:
        kind = name.split("_")[0]
        function = peers.REAL[implementation][kind](folder, work.rows, work.length)
    limit = work.limit(config, work.rows)
    return benchmark.medians({implementation: function, work.limit_name: limit}, repeats)
