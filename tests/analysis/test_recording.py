"""The routing of a model recorded layer by layer, against the model in memory."""

import dataclasses
import os
import pathlib
import signal
import struct
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import config as configs
from moe_jax import hf, model, stores, strict_json
from moe_jax.analysis import decisions, recording
from moe_jax.data.batches import Batch
from moe_jax.hf import safetensors
from moe_jax.model import layout
from tests.hf.test_golden import GOLDEN, NAMES

MIXTURES = [n for n in NAMES if configs.model_of(GOLDEN / n).num_experts]
USUAL = ("lola", "mixtral", "olmoe", "qwen3_moe_mixed")
apply = jax.jit(model.apply, static_argnames=("config", "return_routing"))


def chunks_of(rows_RX, per_chunk, lengths=None):
    """Rows of T + 1 ids as chunks, the last one filled up with padding."""
    R, T = len(rows_RX), rows_RX.shape[1] - 1
    lengths = np.full(R, T) if lengths is None else np.asarray(lengths)
    segment_ids_RT = (np.arange(T) < lengths[:, None]).astype(np.int32)
    padding = ((0, -R % per_chunk), (0, 0))
    rows_RX, segment_ids_RT = np.pad(rows_RX, padding), np.pad(segment_ids_RT, padding)
    return [
        jax.tree.map(np.asarray, Batch.of_rows(rows_RX[part], segment_ids_RT[part]))
        for part in (slice(i, i + per_chunk) for i in range(0, len(rows_RX), per_chunk))
    ]


def ids(config, rows=6, length=16):
    shape = rows, length + 1
    return np.random.default_rng(0).integers(0, config.vocab_size, shape).astype(np.int32)


def recorded(folder, chunks, into, **how):
    weights = stores.weights(configs.Source(pathlib.Path(folder)))
    facts = recording.facts(weights, chunks, ["all"], model="model", text="text")
    recording.record(weights, chunks, facts, into, **how)
    return decisions.load(into)


@pytest.mark.parametrize(
    "name", [n if n in USUAL else pytest.param(n, marks=pytest.mark.long) for n in MIXTURES]
)
def test_a_layer_at_a_time_gives_the_same_bits_as_the_model_in_memory(name, tmp_path):
    config, params = hf.load(GOLDEN / name)
    rows_RX = ids(config)
    found = recorded(GOLDEN / name, chunks_of(rows_RX, 6), tmp_path / "routing")
    # Without optimisation, as in these tests, XLA rounds LOLA's norms otherwise in a loop over
    # layers, by 3e-7; with it, the bits are the same in a loop too.
    unrolled = dataclasses.replace(config, remat="none")
    output = apply(params, jnp.asarray(rows_RX[:, :-1]), unrolled, return_routing=True)
    routing = jax.tree.map(
        lambda x: np.asarray(x).reshape(len(x), -1, x.shape[-1]), output.router.routing
    )
    for n, layer in enumerate(found.facts.layers):
        ((tokens, chosen),) = found.chunks(layer)
        # A router whose selection has a bias does not give falling weights.
        order_NA = np.argsort(-routing.weight_MA[n], axis=1, kind="stable")
        for ours, theirs in (
            (chosen.expert_NA, np.take_along_axis(routing.expert_index_MA[n], order_NA, axis=1)),
            (chosen.weight_NA, np.take_along_axis(routing.weight_MA[n], order_NA, axis=1)),
            (chosen.probability_NP, -np.sort(-routing.probabilities_ME[n], axis=1)[:, :3]),
        ):
            np.testing.assert_array_equal(ours, theirs)
        np.testing.assert_array_equal(tokens.input_N, rows_RX[:, :-1].ravel())
        np.testing.assert_array_equal(tokens.target_N, rows_RX[:, 1:].ravel())
        np.testing.assert_array_equal(
            tokens.predicted_N, np.argmax(output.logits_BTV, axis=-1).ravel()
        )


def arrays_of(found):
    tokens = [(t.input_N, t.target_N, t.predicted_N) for t in [found.tokens()]]
    layers = [
        (chosen.expert_NA, chosen.weight_NA, chosen.probability_NP)
        for layer in found.facts.layers
        for _, chosen in found.chunks(layer)
    ]
    return [np.array(x) for arrays in (*tokens, *layers) for x in arrays]


def test_the_size_of_chunks_and_their_padding_change_nothing(tmp_path):
    config = configs.model_of(GOLDEN / "olmoe")
    rows_RX, lengths = ids(config), [16, 9, 16, 3, 1, 16]
    whole = recorded(GOLDEN / "olmoe", chunks_of(rows_RX, 6, lengths), tmp_path / "whole")
    parts = recorded(GOLDEN / "olmoe", chunks_of(rows_RX, 4, lengths), tmp_path / "parts")
    assert whole.facts == parts.facts and whole.facts.num_tokens == sum(lengths)
    for ours, theirs in zip(arrays_of(whole), arrays_of(parts), strict=True):
        if ours.dtype == np.float32:  # a product of other rows may round otherwise
            np.testing.assert_allclose(ours, theirs, rtol=1e-5)
        else:
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.long
def test_a_run_has_the_same_routing_as_its_exported_folder(tmp_path):
    config, params = hf.load(GOLDEN / "mixtral")
    stores.save(tmp_path / "run", config, params)
    chunks = chunks_of(ids(config), 6)
    run = recorded(tmp_path / "run", chunks, tmp_path / "of_run")
    folder = recorded(GOLDEN / "mixtral", chunks, tmp_path / "of_folder")
    for ours, theirs in zip(arrays_of(run), arrays_of(folder), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_each_weight_is_read_once(tmp_path, monkeypatch):
    read = []
    original = safetensors.Tensor.read

    def counted(tensor, index=()):
        array = original(tensor, index)
        read.append(array.nbytes)
        return array

    config = configs.model_of(GOLDEN / "olmoe")
    weights = stores.weights(configs.Source(GOLDEN / "olmoe"))
    chunks = chunks_of(ids(config, rows=12), 6)
    facts = recording.facts(weights, chunks, ["all"], model="model", text="text")
    monkeypatch.setattr(safetensors.Tensor, "read", counted)
    recording.record(weights, chunks, facts, tmp_path / "routing")
    assert not config.tie_word_embeddings  # a tied one is the first leaf and the last
    tensors = safetensors.open_folder(GOLDEN / "olmoe").values()
    assert sum(read) == sum(tensor.nbytes for tensor in tensors)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("layer", [0, 1])
def test_a_recording_goes_on_after_its_last_finished_layer(layer, tmp_path):
    config = configs.model_of(GOLDEN / "lola")
    chunks, read = chunks_of(ids(config, rows=12), 6), []
    weights = stores.weights(configs.Source(GOLDEN / "lola"))
    facts = recording.facts(weights, chunks, ["all"], model="model", text="text")

    def killed(after):
        if after == layer:
            raise Killed

    with pytest.raises(Killed):
        recording.record(weights, chunks, facts, tmp_path / "routing", after_layer=killed)
    with pytest.raises(ValueError, match="is not finished"):
        decisions.load(tmp_path / "routing")
    again = recording.Weights(
        config,
        weights.paths,
        lambda path, index: read.append((path, index)) or weights.leaf(path, index),
        weights.fingerprint,
    )
    recording.record(again, chunks, facts, tmp_path / "routing")
    resumed = decisions.load(tmp_path / "routing")
    whole = recorded(GOLDEN / "lola", chunks, tmp_path / "whole")
    for ours, theirs in zip(arrays_of(resumed), arrays_of(whole), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    names = [path.name for path in (tmp_path / "routing").iterdir()]
    assert not [name for name in names if "hidden" in name]
    blocks = [(path.split("/")[1], index[0].start) for path, index in read if "blocks/" in path]
    assert {*blocks} == {*layout.slots(config.block_kinds)[layer + 1 :]}


def test_a_finished_recording_is_not_made_again(tmp_path):
    config = configs.model_of(GOLDEN / "olmoe")
    chunks = chunks_of(ids(config), 6)
    found = recorded(GOLDEN / "olmoe", chunks, tmp_path / "routing")
    weights = recording.Weights(config, (), None, "unused")
    recording.record(weights, chunks, found.facts, tmp_path / "routing")


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_dense_model_is_refused(name):
    with pytest.raises(ValueError, match="the model is dense"):
        recording.check(configs.model_of(GOLDEN / name))


def test_a_folder_of_other_routing_is_not_written_into(tmp_path):
    chunks = chunks_of(ids(configs.model_of(GOLDEN / "olmoe")), 6)
    recorded(GOLDEN / "olmoe", chunks, tmp_path / "routing")
    with pytest.raises(ValueError, match="holds the routing of model on text, or with other"):
        recorded(GOLDEN / "olmoe", chunks[:1] * 2, tmp_path / "routing")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ValueError, match="is not empty"):
        recorded(GOLDEN / "olmoe", chunks, tmp_path / "full")


def sparse_folder(folder, num_bytes, **sizes):
    """A Mixtral of zeros whose file takes no disk: a header, and a length."""
    folder.mkdir()
    config = strict_json.read_object(GOLDEN / "mixtral" / "config.json") | sizes
    (folder / "config.json").write_text(strict_json.text(config))
    D, F, V = (config[n] for n in ("hidden_size", "intermediate_size", "vocab_size"))
    H = D // config["num_attention_heads"]
    layer = {
        "input_layernorm.weight": [D],
        "post_attention_layernorm.weight": [D],
        "self_attn.q_proj.weight": [D, D],
        "self_attn.k_proj.weight": [config["num_key_value_heads"] * H, D],
        "self_attn.v_proj.weight": [config["num_key_value_heads"] * H, D],
        "self_attn.o_proj.weight": [D, D],
        "block_sparse_moe.gate.weight": [config["num_local_experts"], D],
    }
    for expert in range(config["num_local_experts"]):
        name = f"block_sparse_moe.experts.{expert}"
        layer |= {f"{name}.w1.weight": [F, D], f"{name}.w2.weight": [D, F]}
        layer |= {f"{name}.w3.weight": [F, D]}
    shapes = {"model.embed_tokens.weight": [V, D], "lm_head.weight": [V, D]}
    shapes |= {"model.norm.weight": [D]}
    per_layer = 2 * sum(int(np.prod(shape)) for shape in layer.values())
    config["num_hidden_layers"] = max(1, round(num_bytes / per_layer))
    (folder / "config.json").write_text(strict_json.text(config))
    for n in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{n}.{name}": shape for name, shape in layer.items()}
    header, at = {}, 0
    for name, shape in shapes.items():
        end = at + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, end]}
        at = end
    text = strict_json.text(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)
    return at


PROGRAM = textwrap.dedent(
    """
    import os, pathlib, signal, sys
    import numpy as np
    from moe_jax import stores
    from moe_jax import config as configs
    from moe_jax.analysis import recording
    from tests.analysis.test_recording import chunks_of, ids

    folder, into, last, length, rows = sys.argv[1:]
    weights = stores.weights(configs.Source(pathlib.Path(folder)))
    chunks = chunks_of(ids(weights.config, int(rows), int(length)), 1)
    facts = recording.facts(weights, chunks, ["all"], model="model", text="text")

    def kill(layer):
        if layer == int(last):
            os.kill(os.getpid(), signal.SIGKILL)

    recording.record(weights, chunks, facts, pathlib.Path(into), after_layer=kill)
    status = dict(line.split(":") for line in open("/proc/self/status").read().splitlines())
    read = dict(line.split(":") for line in open("/proc/self/io").read().splitlines())
    print(int(status["VmHWM"].split()[0]) * 1024, int(read["rchar"]))
    """
)


def run_program(*arguments):
    """The return code, the peak memory and the bytes read of a process that records."""
    root = pathlib.Path(__file__).parents[2]
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "XLA_FLAGS": ""},
    )
    figures = [int(word) for word in ended.stdout.split()[-2:]]
    return ended.returncode, *(figures or (ended.stderr, None))


@pytest.mark.long
@pytest.mark.skipif(not pathlib.Path("/proc/self/io").exists(), reason="measured on Linux")
def test_a_mixture_larger_than_its_memory_is_recorded_and_goes_on_after_sigkill(tmp_path):
    """3.2 GB of weights; by hand, with 20 GB, docs/routing_analysis.md has the numbers."""
    sizes = dict(hidden_size=1024, intermediate_size=1792, num_attention_heads=8, vocab_size=32_000)
    sizes |= dict(num_key_value_heads=8, num_local_experts=8, head_dim=128)
    num_bytes = sparse_folder(tmp_path / "mixture", 3.2e9, **sizes)
    arguments = tmp_path / "mixture", tmp_path / "routing"
    code, _, _ = run_program(*arguments, 10, 64, 2)
    assert code == -signal.SIGKILL
    state = decisions.read_state(tmp_path / "routing")
    assert state.finished == 11
    code, peak, read = run_program(*arguments, -1, 64, 2)
    assert code == 0, peak
    layers = state.facts.num_hidden_layers
    assert decisions.load(tmp_path / "routing").facts.layers == tuple(range(layers))
    assert peak < 1.5e9 < num_bytes
    # The second process read the layers that were left, the head, and Python's own files.
    left = num_bytes * (layers - 11) / layers
    assert 0.9 * left < read < 1.1 * left + 3e8
