"""Flipped bits, and files that are deleted, halved or emptied: found and named, or harmless."""

import logging
import pathlib
import random
import shutil
import struct

import numpy as np
import pytest

from moe_jax import hf, tree
from moe_jax.data import corpus, prepare
from moe_jax.training import checkpoint
from tests.data.test_prepare import open_corpus, tokens_of, write
from tests.faults import runs

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"


def flipped(path, rng, end=None):
    content = bytearray(path.read_bytes())
    content[rng.randrange(end or len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def emptied(path, rng):
    path.write_bytes(b"")


def halved(path, rng):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def deleted(path, rng):
    path.unlink()


DAMAGES = (flipped, emptied, halved, deleted)
# 200 flips over a checkpoint, 160 over the token cache, 150 over a Hugging Face folder.
LONG = pytest.mark.long


# Orbax leaves the other reads of a checkpoint to themselves when one has failed.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning"),
]


# ------------------------------------------------------------------------------------ a checkpoint


@pytest.fixture
def two(unbroken, tmp_path):
    """The last two checkpoints of a run, in a folder each, and the leaves to restore."""
    checkpoints = unbroken[0] / "checkpoints"
    old, new = checkpoint.steps(checkpoints)[-2:]
    for step in (old, new):
        shutil.copytree(checkpoints / str(step), tmp_path / "whole" / str(step) / str(step))
    return tmp_path / "whole" / str(old), tmp_path / "whole" / str(new)


def content(directory, abstract):
    """All that a run takes from its newest sound checkpoint, in bits."""
    found = checkpoint.restore_latest(directory, abstract)
    bits = {name: np.asarray(leaf).tobytes() for name, leaf in found.state.items()}
    return found.step, bits, found.data, found.config


def outcomes(two, tmp_path, caplog, damages):
    """Damages the newer checkpoint again and again; counts how often it is passed over (and is
    named), is read as it was, and is read as something else."""
    old, new = two
    abstract = runs.shapes(new / new.name)
    whole = {directory: content(directory, abstract) for directory in two}
    counts, directory = dict.fromkeys(("found", "harmless", "silent", "unnamed"), 0), tmp_path / "d"
    for damage in damages:
        for source in two:
            shutil.copytree(source, directory, dirs_exist_ok=True)
        damage(directory / new.name)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            found = content(directory, abstract)
        named = str(directory / new.name) in caplog.text
        counts["found"] += found == whole[old]
        counts["unnamed"] += found == whole[old] and not named
        counts["harmless"] += found == whole[new]
        counts["silent"] += found not in whole.values()
        shutil.rmtree(directory)
    return counts


def largest_first(folder):
    """The files of a checkpoint with their sizes, by their paths inside of it."""
    sizes = {p.relative_to(folder): p.stat().st_size for p in folder.rglob("*") if p.is_file()}
    return dict(sorted(sizes.items(), key=lambda item: -item[1]))


# The description: shapes, digests, the config, what the data were.
DESCRIPTION = pathlib.Path("meta/data.json")


@pytest.mark.parametrize("number", [8, pytest.param(200, marks=LONG)])
def test_a_flipped_bit_in_a_checkpoint_is_found_and_named_or_changes_nothing(
    number, two, tmp_path, caplog, figure
):
    rng, new = random.Random(number), two[1]
    sizes = largest_first(new / new.name)
    files = [p for p in sizes if sizes[p]]
    places = [files[i % len(files)] for i in range(number)]
    damages = [lambda folder, place=place: flipped(folder / place, rng) for place in places]
    counts = outcomes(two, tmp_path, caplog, damages)
    figure("bits flipped in a checkpoint", flipped=number, **counts)
    assert not counts["silent"] and not counts["unnamed"]


def test_a_flipped_bit_in_the_config_of_a_checkpoint_is_found(two, tmp_path, caplog):
    def renamed(folder):
        text = (folder / DESCRIPTION).read_bytes()
        assert b"cosine" in text
        (folder / DESCRIPTION).write_bytes(text.replace(b"cosine", b"cosinm"))

    assert outcomes(two, tmp_path, caplog, [renamed])["silent"] == 0


@pytest.mark.parametrize("number", [2, pytest.param(None, marks=LONG)])
def test_a_file_of_a_checkpoint_that_is_deleted_halved_or_emptied_is_found_or_not_needed(
    number, two, tmp_path, caplog, figure
):
    rng, new = random.Random(0), two[1]
    files = list(largest_first(new / new.name))[:number]
    pairs = [(p, damage) for p in files for damage in DAMAGES[1:]]
    damages = [lambda folder, p=p, damage=damage: damage(folder / p, rng) for p, damage in pairs]
    counts = outcomes(two, tmp_path, caplog, damages)
    figure("files of a checkpoint deleted, halved or emptied", damaged=len(pairs), **counts)
    assert not counts["silent"] and not counts["unnamed"]


# --------------------------------------------------------------------------------- the token cache

CACHE = (corpus.MANIFEST, *corpus.ARRAYS, "tokens-00000-00000.array_record")


@pytest.mark.parametrize("flips", [5, pytest.param(40, marks=LONG)])
def test_damage_to_a_file_of_the_token_cache_is_made_anew_or_named(flips, tmp_path, capsys, figure):
    source, rng = write(tmp_path / "a.jsonl"), random.Random(flips)
    whole = open_corpus(source, tmp_path)
    tokens = tokens_of(whole)
    counts = dict.fromkeys(("flipped", "other", "anew", "named", "harmless", "silent"), 0)
    for name in CACHE:
        for damage in [flipped] * flips + list(DAMAGES[1:]):
            damage(whole.folder / name, rng)
            counts["flipped" if damage is flipped else "other"] += 1
            capsys.readouterr()
            corpus = open_corpus(source, tmp_path)
            anew = f"{whole.folder / name} is " in capsys.readouterr().err
            try:
                found = (corpus.labels, corpus.digest, tokens_of(corpus))
            except prepare.DamagedError as error:
                assert damage is flipped and name == CACHE[-1] and str(whole.folder) in str(error)
                counts["named"] += 1
                shutil.rmtree(whole.folder)
                open_corpus(source, tmp_path)
                continue
            same = found == (whole.labels, whole.digest, tokens)
            counts["silent"] += not same
            counts["anew" if anew else "harmless"] += same
    figure("damages to the token cache", **counts)
    assert not counts["silent"]


# --------------------------------------------------------------------------- a Hugging Face folder


@pytest.fixture
def folder(tmp_path):
    """A model in two shards with their index, which only the golden files beside it do not join."""
    ignored = shutil.ignore_patterns("*.npz", "config.v4.json", "meta.json")
    return shutil.copytree(GOLDEN / "mixtral_sharded", tmp_path / "model", ignore=ignored)


def model_in(folder):
    config, params = hf.load(folder)
    return config, {name: leaf.tobytes() for name, leaf in tree.flatten(params).items()}


def header_bytes(path):
    """The length of what says where the weights are, in a safetensors file or in JSON."""
    content = path.read_bytes()
    return len(content) if path.suffix == ".json" else 8 + struct.unpack("<Q", content[:8])[0]


@pytest.mark.parametrize("number", [12, pytest.param(150, marks=LONG)])
def test_a_flipped_bit_in_a_hugging_face_folder_is_named_or_changes_nothing(number, folder, figure):
    """The weights themselves have no digest in this format, nor have numbers in config.json."""
    rng, whole = random.Random(number), model_in(folder)
    counts = {"flipped": number, **dict.fromkeys(("refused", "harmless", "silent"), 0)}
    places = sorted(path for path in folder.iterdir() if path.name != "config.json")
    for i in range(number):
        path = places[i % len(places)]
        content = path.read_bytes()
        flipped(path, rng, header_bytes(path))
        try:
            counts["harmless" if model_in(folder) == whole else "silent"] += 1
        except ValueError as error:
            assert str(folder) in str(error) and "\n" not in str(error)
            counts["refused"] += 1
        path.write_bytes(content)
    figure("bits flipped in a Hugging Face folder", **counts)
    assert not counts["silent"]
