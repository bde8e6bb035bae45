"""The benchmarks, each a function that yields its cases."""

import dataclasses
import functools
import itertools
import pathlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import model, stores
from moe_jax.benchmark import sizes
from moe_jax.config import Run
from moe_jax.config.sections import Balance, Training
from moe_jax.data.batches import Batch
from moe_jax.evaluation import generate
from moe_jax.hf import folders, tensors, writing
from moe_jax.model import layers, moe, remat, transformer
from moe_jax.ops import attention, cross_entropy, grouped_matmul
from moe_jax.ops import implementations as ops
from moe_jax.training import flops, optimizer, step
from moe_jax.training.state import TrainState
from moe_jax.upcycle import plan as plans


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    tokens: int
    implementations: dict[str, Callable]
    bound: str
    bound_function: Callable
    config: model.ModelConfig | None = None  # the model that a peer should build


def _case(name: str, implementations: dict, bound: str, bound_function: Callable, **more) -> Case:
    """A case with one batch of this backend's sizes."""
    tokens = sizes.here().B * sizes.here().T
    return Case(name, tokens, implementations, bound, bound_function, **more)


def grouped_matmul_cases() -> Iterator[Case]:
    """Value and both gradients; the bound is a batched matrix product over equal groups."""
    implementations = [ops.pick(grouped_matmul.IMPLEMENTATIONS, ops.platform())]
    implementations += ["blocked"] if ops.platform() == "cpu" else []
    for name, (M, D, F, E) in sizes.here().groups.items():
        x_MD, w_EDF, grad_MF = _normal((M, D), (E, D, F), (M, F))
        zipf_E = 1 / np.arange(1, E + 1)
        zipf_E = np.floor(M * zipf_E / zipf_E.sum()).astype(np.int32)
        zipf_E[0] += M - zipf_E.sum()
        for groups, sizes_E in (("balanced", np.full(E, M // E)), ("zipf", zipf_E)):
            sizes_E = jnp.asarray(sizes_E, jnp.int32)

            product = functools.partial(grouped_matmul.grouped_matmul, group_sizes_E=sizes_E)

            def einsum(x_MD, w_EDF):
                x_ERD = x_MD.reshape(len(w_EDF), -1, x_MD.shape[1])
                y_ERF = jnp.einsum("erd,edf->erf", x_ERD, w_EDF)
                return y_ERF.reshape(len(x_MD), -1)

            ours = _each(product, implementations, (x_MD, w_EDF), grad_MF)
            bound = _with_gradients(einsum, (x_MD, w_EDF), grad_MF)
            yield Case(f"{name} {groups}", M, ours, "einsum over equal groups", bound)


def attention_cases() -> Iterator[Case]:
    """Value and gradients; the bound is the products of all pairs, without softmax and mask."""
    picked = ops.pick(attention.IMPLEMENTATIONS, ops.platform())
    for rows, length, heads, H in sizes.here().attention:
        shape = (rows, length, heads, H)
        *arrays, grad_BTNH = _normal(shape, shape, shape, shape)
        segments_BT = jnp.ones((rows, length), jnp.int32)
        attend = functools.partial(attention.attention, segment_ids_BT=segments_BT)

        def products(q_BTNH, k_BTNH, v_BTNH):
            pairs_BNTS = jnp.einsum("btnh,bsnh->bnts", q_BTNH, k_BTNH)
            return jnp.einsum("bnts,bsnh->btnh", pairs_BNTS, v_BTNH)

        ours = _each(attend, (picked, "reference"), arrays, grad_BTNH)
        bound = _with_gradients(products, arrays, grad_BTNH)
        yield Case(f"T={length} H={H}", rows * length, ours, "products of all pairs", bound)


def cross_entropy_cases() -> Iterator[Case]:
    """Value and both gradients; the bound is three matrix products of the same sizes."""
    here = sizes.here()
    B, T, D = here.B, here.T, next(iter(here.models.values())).hidden_size
    targets_BT, weight_BT = jnp.zeros((B, T), jnp.int32), jnp.ones((B, T))

    def loss(x_BTD, unembed_DV, implementation):
        return cross_entropy.cross_entropy(
            x_BTD, unembed_DV, targets_BT, weight_BT, implementation=implementation
        ).total

    def products(x_BTD, unembed_DV):
        return jnp.einsum("btd,dv->btv", x_BTD, unembed_DV)

    for V in here.vocabularies:
        x_BTD, unembed_DV, grad_BTV = _normal((B, T, D), (D, V), (B, T, V))
        arrays = (x_BTD, unembed_DV)
        losses = _each(loss, ("chunked", "reference"), arrays, jnp.ones(()))
        bound = _with_gradients(products, arrays, grad_BTV)
        yield _case(f"V={V}", losses, "three products", bound)


def _dense(sparse: model.ModelConfig) -> model.ModelConfig:
    """The dense model with the same active FLOPs, F' = A·F."""
    return dataclasses.replace(
        sparse,
        intermediate_size=sparse.num_experts_per_tok * sparse.expert_size,
        num_experts=0,
        model_type="llama",
    )


def moe_layer_cases() -> Iterator[Case]:
    """One layer's value and gradients; the bound is the dense layer with F' = A·F."""
    B, T = sizes.here().B, sizes.here().T
    for name, sparse in sizes.here().models.items():
        dense = _dense(sparse)
        x_BTD, grad_BTD = _normal(*[(B, T, sparse.hidden_size)] * 2)
        params = {
            c: jax.tree.map(lambda w: w[0], model.init(c, jax.random.key(0))["blocks"]["0"])
            for c in (sparse, dense)
        }
        valid_BT = jnp.ones((B, T), bool)

        def moe_layer(x_BTD, params, config=sparse, valid_BT=valid_BT):
            return moe.moe(x_BTD, params, valid_BT, config, training=True)[0]

        ours = _with_gradients(moe_layer, (x_BTD, params[sparse]["moe"]), grad_BTD)
        mlp = functools.partial(layers.mlp, config=dense)
        bound = _with_gradients(mlp, (x_BTD, params[dense]["mlp"]), grad_BTD)
        yield _case(name, {"moe": ours}, "dense_layer", bound)


def block_stack_cases() -> Iterator[Case]:
    """Value and gradients of a model's blocks; the bound executes the same FLOPs as a sequence of
    large matrix products, so 1 / ratio is the MFU relative to the device's attainable rate."""
    B, T = sizes.here().B, sizes.here().T
    for name, sparse in sizes.here().models.items():
        params = _init(sparse)
        tokens_BT = jax.random.randint(jax.random.key(1), (B, T), 0, sparse.vocab_size)
        shared = transformer.Shared(
            jnp.tile(jnp.arange(T), (B, 1)), jnp.ones((B, T), jnp.int32), jax.random.key(2)
        )

        def blocks(params, config=sparse, tokens_BT=tokens_BT, shared=shared):
            return transformer.hidden_states(params, tokens_BT, shared, config)[0]

        ours = _with_gradients(blocks, (params,), *_normal((B, T, sparse.hidden_size)))
        head = 6 * sparse.hidden_size * sparse.vocab_size
        bound = large_products(B * T * (flops.model_flops(sparse, T) - head))
        name += f" x {sparse.num_hidden_layers} layers"
        yield _case(name, {"moe": ours}, "large products", bound)


def train_step_cases() -> Iterator[Case]:
    """A whole training step; the bound is the step of the dense model with F' = A·F."""
    for name, sparse in sizes.here().models.items():
        dense = _train_step(_dense(sparse))
        yield _case(name, {"moe": _train_step(sparse)}, "dense_step", dense, config=sparse)


def full_step_cases() -> Iterator[Case]:
    """A step of all layers with remat "full"; the bound is that of `block_stack_cases` and of the
    head's products. OLMoE-1B-7B needs 120 GB of a GPU's memory."""
    B, T = sizes.here().B, sizes.here().T
    for name, config in sizes.here().whole.items():
        bound = large_products(B * T * flops.model_flops(config, T))
        yield _case(name, {"moe": _train_step(config)}, "large products", bound)


def forced_balance_cases() -> Iterator[Case]:
    """The train step with tokens assigned to experts in turn: shows the cost of uneven routing."""
    for name, sparse in sizes.here().models.items():
        balanced = _train_step(dataclasses.replace(sparse, router="forced_balance"))
        learned = _train_step(sparse)
        yield _case(f"{name} forced-balance", {"moe": balanced}, "learned routing", learned)


def remat_cases() -> Iterator[Case]:
    """The train step under each remat policy; the bound is the step without remat."""
    name, sparse = next(iter(sizes.here().models.items()))
    sparse = dataclasses.replace(sparse, num_hidden_layers=8)
    steps = {name: _train_step(dataclasses.replace(sparse, remat=name)) for name in remat.SAVED}
    yield _case(f"{name} x 8 layers", steps, "no remat", _train_step(sparse))


def window_cases() -> Iterator[Case]:
    """A step of 4 microbatches with the balance loss over the exact accumulation window; the bound
    averages it over microbatches."""
    name, sparse = next(iter(sizes.here().models.items()))
    window, average = (
        _train_step(
            sparse, training=Training(accumulation_steps=4), balance=Balance(load_balancing_over=o)
        )
        for o in ("window", "global")
    )
    yield _case(f"{name}, 4 microbatches", {"window": window}, "average", average)


def decode_cases() -> Iterator[Case]:
    """Continuations of a batch of prompts, with the weights in the computation's dtype; the bound
    computes only the new tokens, without a cache."""
    here, length, num_tokens = sizes.here(), 32, 32
    for (name, config), rows in itertools.product(here.models.items(), here.decoded):
        params = _init(config, config.dtype)
        prompts = list(np.random.default_rng(0).integers(0, config.vocab_size, (rows, length)))

        def decode(config=config, params=params, prompts=prompts):
            return generate.generate(params, config, prompts, num_tokens=num_tokens)

        @jax.jit
        def products(params, tokens_B, config=config):
            def next_token(_, tokens_B):
                logits_B1V = model.apply(params, tokens_B[:, None], config).logits_BTV
                return jnp.argmax(logits_B1V[:, 0], axis=-1).astype(tokens_B.dtype)

            return jax.lax.fori_loop(0, num_tokens, next_token, tokens_B)

        bound = functools.partial(products, params, jnp.zeros(rows, jnp.int32))
        name += f", {rows} rows"
        yield Case(name, rows * num_tokens, {"kv cache": decode}, "one position's products", bound)


def upcycle_cases() -> Iterator[Case]:
    """Upcycles a folder to a folder with 8 experts in float16; "tokens" counts the new parameters.

    The bounds are copying the new folder's file, and drawing as many normal numbers.
    """
    config = dataclasses.replace(model.PRESETS["drop-upcycling-1.5b"], num_hidden_layers=1)
    moe_config = config.to_moe(num_experts=8, num_experts_per_tok=2)
    dtypes = dict.fromkeys(tensors.shapes(config), np.dtype(np.float16))
    draw = np.random.default_rng(0).standard_normal
    with tempfile.TemporaryDirectory(prefix="moe_jax-benchmark-") as scratch:
        root, dense = pathlib.Path(scratch), pathlib.Path(scratch) / "dense"

        def normal(part):
            return draw(part.shape, np.float32).astype(np.float16)

        writing.write(dense, config, dtypes, normal)

        def upcycle(recipe):
            shutil.rmtree(root / recipe, ignore_errors=True)
            plan = plans.make(config, moe_config, recipe=recipe, parameters={})
            stores.upcycle_folders(plan, [folders.Folder(dense)], root / recipe, jax.random.key(0))

        upcycle("naive")
        file = root / "naive" / "model.safetensors"
        copy = functools.partial(shutil.copyfile, file, root / "copy")
        numbers = file.stat().st_size // 2
        eighth = jax.jit(lambda key: jax.random.normal(key, (numbers // 8,)))

        def normals():
            for i in range(8):
                eighth(jax.random.key(i)).block_until_ready()

        bounds = (
            ("naive", "file copy", copy),
            ("drop", "file copy", copy),
            ("drop", "normals", normals),
        )
        for recipe, bound, function in bounds:
            ours: dict[str, Callable] = {recipe: functools.partial(upcycle, recipe)}
            yield Case(f"{numbers / 1e6:.0f} M numbers", numbers, ours, bound, function)


ONE_STEP = """
from moe_jax import config

def get_config():
    one_step = config.default()
    one_step.model.update(
        vocab_size=259, hidden_size=128, intermediate_size=256, num_hidden_layers=4,
        num_attention_heads=4,
    )
    one_step.data.update(source="embedded", sequence_length=128)
    one_step.training.update(num_steps=1, batch_size=8)
    one_step.evaluation.update(batch_size=8, max_batches=1, final_max_batches=1)
    return one_step
"""


def startup_cases() -> Iterator[Case]:
    """Commands in a process of their own, up to their end; the bound is Python that does nothing.

    "first step" is a whole run of one step of a small dense model; its text is tokenized already.
    """

    def python(*arguments: str, status: int = 0) -> Callable:
        def run():
            done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
            if done.returncode != status:
                raise RuntimeError(f"{' '.join(arguments)} failed: {done.stderr[-1000:]}")

        return run

    with tempfile.TemporaryDirectory(prefix="moe_jax-benchmark-") as scratch:
        config, numbers = pathlib.Path(scratch) / "config.py", itertools.count()
        config.write_text(ONE_STEP)

        def first_step():
            workdir = f"--workdir={scratch}/{next(numbers)}"
            return python("-m", "moe_jax", "train", f"--config={config}", workdir)()

        commands = {
            "import": python("-c", "import moe_jax"),
            "usage error": python("-m", "moe_jax", "train", "--confg=x", status=2),
            "help": python("-m", "moe_jax", "train", "--help"),
            "first step": first_step,
        }
        yield Case("startup", 1, commands, "python -c pass", python("-c", "pass"))


BENCHMARKS = {
    "grouped_matmul": grouped_matmul_cases,
    "attention": attention_cases,
    "cross_entropy": cross_entropy_cases,
    "moe_layer": moe_layer_cases,
    "block_stack": block_stack_cases,
    "train_step": train_step_cases,
    "full_step": full_step_cases,
    "forced_balance": forced_balance_cases,
    "remat": remat_cases,
    "window": window_cases,
    "decode": decode_cases,
    "upcycle": upcycle_cases,
    "startup": startup_cases,
}


def _normal(*shapes: tuple[int, ...]) -> list[jax.Array]:
    dtype = sizes.here().dtype
    return [jax.random.normal(jax.random.key(i), s).astype(dtype) for i, s in enumerate(shapes)]


def large_products(number_of_flops: float) -> Callable:
    """A chain of large matrix products with this number of FLOPs, accurate to half a percent."""
    width = sizes.here().ceiling
    number = max(1, round(number_of_flops / (2 * width**3)))
    rows = 64 * max(1, round(number_of_flops / (2 * width**2 * number) / 64))
    y, w = _normal((rows, width), (width, width))
    w = w * width**-0.5  # keeps the scale of the activations

    @jax.jit
    def products(y, w):
        return jax.lax.fori_loop(0, number, lambda _, y: jnp.matmul(y, w), y)

    return lambda: products(y, w)


def _each(function: Callable, names: Sequence[str], arrays: Sequence, cotangent: jax.Array) -> dict:
    """Name of an implementation -> `_with_gradients` of `function` with it."""
    calls = {name: functools.partial(function, implementation=name) for name in names}
    return {name: _with_gradients(call, arrays, cotangent) for name, call in calls.items()}


def _with_gradients(function: Callable, arrays: Sequence, cotangent: jax.Array) -> Callable:
    """A function that computes the value and the gradients for all arrays."""

    @jax.jit
    def value_and_gradients(arrays, cotangent):
        value, transpose = jax.vjp(function, *arrays)
        return value, transpose(cotangent)

    return lambda: value_and_gradients(arrays, cotangent)


def _init(config: model.ModelConfig, dtype: str = "float32") -> dict:
    init = jax.jit(lambda key: jax.tree.map(lambda w: w.astype(dtype), model.init(config, key)))
    return init(jax.random.key(0))


def _train_step(config: model.ModelConfig, **sections) -> Callable:
    here, run = sizes.here(), Run(model=config, **sections)
    return train_step(run, _init(config), rows=here.B, length=here.T)


def train_step(settings: Run, params: dict, *, rows: int, length: int) -> Callable:
    """A function that makes one step; the first step takes over the memory of `params`."""
    tx = optimizer.adamw(settings.optimizer, 1000)
    state = jax.jit(lambda params: TrainState.create(params, tx), donate_argnums=0)(params)
    shape, most = (rows, length + 1), settings.model.vocab_size
    batch = Batch.of_rows(jax.random.randint(jax.random.key(1), shape, 0, most))
    update = jax.jit(step.make_train_step(settings, tx), donate_argnums=0)

    def one_step():
        nonlocal state
        state, metrics = update(state, batch)
        return state, metrics.loss

    return one_step
