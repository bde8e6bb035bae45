"""A Beam pipeline writes the bytes that one process writes. It needs apache-beam."""

import functools
import os
import pathlib

import numpy as np
import pytest

from moe_jax.data import prepare, text_files
from moe_jax.data.preparation import Job
from tests.data.test_preparation import content, make
from tests.data.test_prepare import BYTES, RECORDS, write

ROOT = pathlib.Path(__file__).parents[2]
SPECS = {
    "none": (),
    "filters": ("characters:20,", "repeated_ngrams:4"),
    "duplicates": ("language:en,ru", "exact_duplicates"),
}


def source_of_parts(folder, monkeypatch):
    monkeypatch.setattr(text_files, "GROUP_BYTES", 2000)
    for number in range(8):
        write(folder / "text" / f"{number}.jsonl", (RECORDS * 2)[number::8])
    return str(folder / "text")


def by_beam(source, output, specs, options=("--runner=DirectRunner",)):
    pipeline = pytest.importorskip("moe_jax.data.beam_pipeline", exc_type=ImportError)
    write_shards = functools.partial(pipeline.write_shards, options=options)
    text = prepare.Text(source, 0.2, output.parent / "cache")
    job = Job(BYTES, specs, shard_bytes=200)
    return prepare.prepare_folder(text, output, job, write_shards=write_shards)


@pytest.mark.long
@pytest.mark.parametrize("specs", SPECS.values(), ids=SPECS)
def test_direct_runner_writes_the_bytes_of_a_single_process(specs, tmp_path, monkeypatch):
    pytest.importorskip("apache_beam")
    source = source_of_parts(tmp_path, monkeypatch)
    made = make(source, tmp_path / "one", specs=specs)
    assert len(made["train"]["shards"]) > 5
    assert bool(specs) == any(facts["dropped"] for facts in made.values())
    assert by_beam(source, tmp_path / "beam", specs) == made
    assert content(tmp_path / "beam") == content(tmp_path / "one")


@pytest.mark.long
def test_a_runner_of_several_processes_writes_the_same_bytes(tmp_path, monkeypatch):
    pytest.importorskip("apache_beam")
    rng = np.random.default_rng(0)
    for number in range(6):
        texts = (" ".join(rng.integers(0, 999, 300).astype(str)) for _ in range(20))
        records = [{"text": text, "lang": str(number % 2)} for text in texts]
        write(tmp_path / "text" / f"{number}.jsonl", records + records[:3])
    source, specs = str(tmp_path / "text"), ("exact_duplicates",)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    make(source, tmp_path / "one", specs=specs, shard_bytes=20_000)
    pipeline = pytest.importorskip("moe_jax.data.beam_pipeline", exc_type=ImportError)
    options = ["--runner=DirectRunner", "--direct_running_mode=multi_processing"]
    text = prepare.Text(source, 0.2, tmp_path / "cache")
    job = Job(BYTES, specs, shard_bytes=20_000)
    prepare.prepare_folder(
        *(text, tmp_path / "beam", job),
        write_shards=functools.partial(
            pipeline.write_shards, options=[*options, "--direct_num_workers=2"]
        ),
    )
    assert content(tmp_path / "beam") == content(tmp_path / "one")


def test_near_duplicates_are_refused_for_they_need_an_order(tmp_path):
    pytest.importorskip("apache_beam")
    pytest.importorskip("datasketch")
    source = write(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match="near_duplicates needs one machine"):
        by_beam(source, tmp_path / "out", ("near_duplicates",))
