"""Prepared corpora: the same bytes whoever makes them and however often they are interrupted."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from moe_jax.data import (
    corpus,
    policy,
    preparation,
    prepare,
    shards,
    sources,
    text_files,
    tokenizers,
)
from moe_jax.data.document import Document
from moe_jax.data.encoding import Encoded
from moe_jax.data.preparation import Job
from tests.data.test_prepare import BYTES, RECORDS, open_corpus, tokens_of, write

ROOT = pathlib.Path(__file__).parents[2]


def make(
    source, output, *, specs=(), workers=1, shard_bytes=200, tokenizer=BYTES, fraction=0.2, **how
):
    reading = policy.Reading(**how)
    job = Job(tokenizer, tuple(specs), reading.skip_damaged, shard_bytes)
    text = preparation.Text(source, fraction, output.parent / "cache", reading)
    return prepare.prepare_folder(text, output, job, workers=workers)


def content(folder):
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A source, and the folder made of it by one process at once."""
    folder = tmp_path_factory.mktemp("whole")
    source = write(folder / "a.jsonl", RECORDS * 2)
    made = make(source, folder / "out", specs=["exact_duplicates"])
    assert len(made["train"]["shards"]) > 3
    assert corpus.in_shards({"shards": [1]}) == "1 shard"
    assert corpus.in_shards(made["train"]) == f"{len(made['train']['shards'])} shards"
    return source, folder / "out"


def test_a_prepared_corpus_has_the_documents_of_the_source_in_their_order(tmp_path):
    source = write(tmp_path / "a.jsonl")
    make(source, tmp_path / "out")
    for split in ("train", "validation"):
        cached = open_corpus(source, tmp_path, split=split, fraction=0.2)
        found = prepare.open_corpus(
            f"prepared:{tmp_path / 'out'}", split, BYTES, validation_fraction=0.5, cache=tmp_path
        )
        assert len(found.shards) > len(cached.shards) == 1
        assert tokens_of(found) == tokens_of(cached)
        for name in ("labels", "digest", "num_tokens", "bytes_per_token", "byte_counts"):
            assert getattr(found, name) == getattr(cached, name)
        assert np.array_equal(found.label_ids, cached.label_ids)


def test_two_processes_write_the_bytes_that_one_writes(whole, tmp_path):
    source, one = whole
    make(source, tmp_path / "out", specs=["exact_duplicates"], workers=2)
    assert content(tmp_path / "out") == content(one)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("seed", range(4))
def test_interrupted_anywhere_five_times_it_ends_with_the_bytes_of_the_unbroken_one(
    seed, whole, tmp_path, monkeypatch
):
    """Each renaming of a finished file is a moment to stop at: before or after it."""
    source, one = whole
    rng, replace = np.random.default_rng(seed), pathlib.Path.replace
    for _ in range(5):
        left, after = int(rng.integers(1, 15)), rng.integers(2)

        def counting(path, target, left=left, after=after, done=[0]):  # noqa: B006
            done[0] += 1
            if done[0] == left and not after:
                raise Killed
            result = replace(path, target)
            if done[0] == left:
                raise Killed
            return result

        monkeypatch.setattr(pathlib.Path, "replace", counting)
        try:
            make(source, tmp_path / "out", specs=["exact_duplicates"])
        except Killed:
            pass
        monkeypatch.setattr(pathlib.Path, "replace", replace)
    make(source, tmp_path / "out", specs=["exact_duplicates"])
    assert content(tmp_path / "out") == content(one)


@pytest.mark.long
@pytest.mark.parametrize("workers", [1, 2])
def test_killed_at_random_moments_five_times_it_equals_the_unbroken_one(workers, tmp_path):
    rng = np.random.default_rng(workers)
    words = [f"w{n}" for n in range(3000)]
    records = [
        {"text": " ".join(rng.choice(words, 400)), "doc": n % 9000, "lang": str(n % 3)}
        for n in range(10_000)
    ]
    source = write(tmp_path / "a.jsonl", records + records[:500])

    def start(output):
        return subprocess.Popen(
            [sys.executable, "scripts/prepare_data.py", f"--source={source}"]
            + [f"--output={output}", "--tokenizer=bytes", "--shard_mb=1", f"--workers={workers}"]
            + ["--filter=exact_duplicates", "--filter=repeated_ngrams"],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL,
        )

    began = time.monotonic()
    assert start(tmp_path / "one").wait() == 0
    took, kills = time.monotonic() - began, 0
    while kills < 5:
        running = start(tmp_path / "out")
        try:
            running.wait(rng.uniform(0.3, 1) * took * (0.2 + 0.15 * kills))
            shutil.rmtree(tmp_path / "out")  # it was too late to kill it
        except subprocess.TimeoutExpired:
            running.send_signal(signal.SIGKILL)
            running.wait()
            kills += 1
    assert start(tmp_path / "out").wait() == 0
    assert content(tmp_path / "out") == content(tmp_path / "one")


def test_a_finished_shard_is_not_made_again(whole, tmp_path, monkeypatch):
    source, _ = whole
    calls, write_shard = [], shards.write

    def counting(path, *arguments, **how):
        if len(calls) == 5:
            raise Killed
        calls.append(path.name)
        return write_shard(path, *arguments, **how)

    monkeypatch.setattr(shards, "write", counting)
    for _ in range(20):
        try:
            make(source, tmp_path / "out")
            break
        except Killed:
            calls[:5] = []
            monkeypatch.setattr(shards, "write", write_shard)
    before = content(tmp_path / "out")
    monkeypatch.setattr(shards, "write", None)
    make(source, tmp_path / "out")
    assert content(tmp_path / "out") == before


def test_the_parts_of_a_source_are_groups_of_files_and_change_no_document(tmp_path, monkeypatch):
    for number in range(6):
        write(tmp_path / "text" / f"{number}.jsonl", RECORDS[number::6])
    source = str(tmp_path / "text")
    make(source, tmp_path / "one")
    monkeypatch.setattr(text_files, "GROUP_BYTES", 1500)
    sizes = [path.stat().st_size for path in sorted((tmp_path / "text").iterdir())]
    assert 1 < len(sources.parts(source)) < 6 and min(sizes) > 0
    make(source, tmp_path / "parts")
    loaded = [corpus.TokenizedCorpus.load(tmp_path / name / "train") for name in ("one", "parts")]
    assert len({shard.name[:12] for shard in loaded[1].shards}) == len(sources.parts(source))
    assert tokens_of(loaded[0]) == tokens_of(loaded[1]) and loaded[0].digest == loaded[1].digest


def test_the_digest_depends_on_documents_and_their_order_but_not_on_where_shards_are_cut():
    def digest(*groups):
        facts = shards.Facts()
        for group in groups:
            part = shards.Facts()
            for ids in group:
                part.add_document(Document("", "all"), Encoded(np.array(ids, np.uint32), ""))
            facts.add(part)
        return facts.hash

    a, b, c = [1, 2], [3], [4, 5, 6]
    assert digest([a, b, c]) == digest([a], [b, c]) == digest([a, b], [], [c])
    others = digest([b, a, c]), digest([a, b]), digest([[1, 2, 3], c]), digest([[1], [2, 3], c])
    assert len({digest([a, b, c]), *others}) == 5


class Refusing(tokenizers.ByteTokenizer):
    def encode(self, text):
        if text.startswith("ru 1"):
            raise RuntimeError("no unknown token")
        return super().encode(text)


def test_records_that_cannot_be_used_are_set_aside_up_to_a_number(tmp_path):
    source = write(tmp_path / "a.jsonl")
    made = make(source, tmp_path / "out", tokenizer=Refusing(), skip_damaged=9)
    bad = sum(facts["skipped"].get("cannot be tokenized", 0) for facts in made.values())
    assert bad == sum(r["text"].startswith("ru 1") for r in RECORDS) == 3
    lines = [
        line
        for split in made
        if (path := tmp_path / "out" / split / preparation.QUARANTINE).exists()
        for line in path.read_text().splitlines()
    ]
    assert len(lines) == 3 and all('"ru 1' in line or "'ru 1" in line for line in lines)
    assert all("no unknown token" in line for line in lines)
    documents = sum(sum(facts["documents_per_label"]) for facts in made.values())
    assert documents == len(RECORDS) - 3
    with pytest.raises(ValueError, match="'ru 1.* cannot be tokenized"):
        make(source, tmp_path / "other", tokenizer=Refusing(), skip_damaged=2)


def test_records_that_cannot_be_read_are_set_aside_up_to_a_number(tmp_path):
    """The first line is in both splits' reading, since nobody knows to which it would belong."""
    source = pathlib.Path(write(tmp_path / "a.jsonl"))
    lines = source.read_text().splitlines()
    source.write_text("\n".join(["{broken", *lines[:5], '{"text": 3}', *lines[5:]]) + "\n")
    with pytest.raises(ValueError, match="a.jsonl:1"):
        make(str(source), tmp_path / "strict")
    with pytest.raises(ValueError, match="2 records cannot be used"):
        make(str(source), tmp_path / "one", skip_damaged=1)
    made = make(str(source), tmp_path / "out", skip_damaged=2)
    for split, facts in made.items():
        assert sum(facts["skipped"].values()) == 2
        named = (tmp_path / "out" / split / preparation.QUARANTINE).read_text().splitlines()
        assert len(named) == 2 and "a.jsonl:1" in named[0] and "a.jsonl:7" in named[1]
        assert corpus.TokenizedCorpus.load(tmp_path / "out" / split).skipped == facts["skipped"]
    documents = sum(sum(facts["documents_per_label"]) for facts in made.values())
    assert documents == len(RECORDS)


@pytest.mark.parametrize("case", ["tokenizer", "no folder", "unfinished", "no held-out text"])
def test_a_prepared_corpus_that_does_not_fit_is_refused_with_the_fix(case, tmp_path, whole):
    source, folder = whole
    folder = shutil.copytree(folder, tmp_path / "prepared")
    tokenizer, split, message = BYTES, "train", ""
    if case == "tokenizer":
        tokenizer = tokenizers.ByteTokenizer(fingerprint="another")
        message = "was prepared with the tokenizer bytes, not another"
    elif case == "no folder":
        folder, message = tmp_path / "nothing", "no folder that prepare_data has finished; run"
    elif case == "unfinished":
        (folder / "train" / corpus.MANIFEST).unlink()
        message = "no folder that prepare_data has finished; run prepare_data with --output="
    else:
        shutil.rmtree(folder / "validation")
        split, message = "validation", "no validation documents; prepare it with another"
    with pytest.raises(ValueError, match=message):
        prepare.open_corpus(
            f"prepared:{folder}", split, tokenizer, validation_fraction=0.1, cache=tmp_path
        )


def test_tokens_are_not_read_as_text(whole, tmp_path):
    _, folder = whole
    with pytest.raises(ValueError, match="has tokens, no text"):
        sources.documents(f"prepared:{folder}", "train", validation_fraction=0, data_dir=tmp_path)
    with pytest.raises(ValueError, match=r"has tokens, no text; give prepared:.*out$"):
        list(
            sources.documents(
                str(folder / "train"), "train", validation_fraction=0, data_dir=tmp_path
            )
        )


def test_another_job_in_the_same_folder_is_refused(whole, tmp_path):
    source, folder = whole
    folder = shutil.copytree(folder, tmp_path / "out")
    with pytest.raises(
        ValueError, match="begun with a different value of --filter and --shard_mb; u"
    ):
        make(source, folder, shard_bytes=300)
    plan = (folder / prepare.PLAN).read_text()
    (folder / prepare.PLAN).write_text(plan.replace('"filter"', '"filters"'))
    with pytest.raises(ValueError, match="begun with another version; use the same, choose"):
        make(source, folder)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a.txt").touch()
    with pytest.raises(ValueError, match="has something else; choose another folder"):
        make(source, tmp_path / "full")


def test_other_options_may_follow_until_a_shard_is_finished_and_another_cap_at_any_time(tmp_path):
    path, out = tmp_path / "a.jsonl", tmp_path / "out"
    text = pathlib.Path(write(path)).read_text()
    path.write_text("bad\n" + text + "bad\n")
    how = dict(specs=["exact_duplicates"], shard_bytes=10**6)
    with pytest.raises(ValueError, match="a.jsonl:1 is not"):
        make(str(path), out, **how)
    with pytest.raises(ValueError, match="2 records cannot be used"):
        make(str(path), out, skip_damaged=1)
    with pytest.raises(ValueError, match="begun with a different value of --skip_damaged; use"):
        make(str(path), out)
    make(str(path), out, skip_damaged=3)
    make(str(path), tmp_path / "at once", skip_damaged=3)
    assert content(out) == content(tmp_path / "at once")


def test_verify_finds_a_changed_byte_that_opening_does_not_read(whole, tmp_path):
    _, folder = whole
    folder = shutil.copytree(folder, tmp_path / "out")
    assert sum(prepare.verify(folder)) > 0
    path = sorted(folder.glob("train/*.array_record"))[-1]
    changed = bytearray(path.read_bytes())
    changed[len(changed) // 2] ^= 1
    path.write_bytes(changed)
    opened = corpus.TokenizedCorpus.load(folder / "train")
    words = (
        rf"{path.name} is damaged at record [01] \(.*; remove it, and prepare_data with the same"
    )
    with pytest.raises(corpus.DamagedError, match=words):
        tokens_of(opened)
    with pytest.raises(corpus.DamagedError, match=path.name):
        list(prepare.verify(folder))
    path.write_bytes(changed[:-1])
    with pytest.raises(corpus.DamagedError, match=path.name):
        corpus.TokenizedCorpus.load(folder / "train")


DAMAGE = {  # the end of a file's name, what is done to it, and the words that say so
    "manifest.json": [
        (lambda c: c[:-9], "damaged (is not JSON"),
        (None, "unfinished: it has no m"),
    ],
    "pairs.npy": [
        (lambda c: c[:-1], "damaged ("),
        (lambda c: b"", "damaged ("),
        (None, "missing;"),
    ],
    ".array_record": [(lambda c: c[:-1], "damaged (it has "), (None, "missing;")],
}


@pytest.mark.parametrize("specs", [(), ("exact_duplicates",)])
def test_a_damaged_file_is_named_and_made_again_when_it_is_removed(specs, tmp_path, capsys):
    source, folder = write(tmp_path / "a.jsonl", RECORDS * 2), tmp_path / "out"
    make(source, folder, specs=specs)
    before = content(folder)
    for ending, damages in DAMAGE.items():
        path = sorted(folder.glob(f"train/*{ending}"))[-1]
        for damage, words in damages:
            path.write_bytes(damage(path.read_bytes())) if damage else path.unlink()
            with pytest.raises(corpus.DamagedError) as refused:
                corpus.TokenizedCorpus.load(folder / "train")
            said, named = str(refused.value), path.parent if "unfin" in words else path
            assert said.startswith(f"{named} is {words}") and "with the same options" in said
            path.unlink(missing_ok=True)
            make(source, folder, specs=specs)
            assert content(folder) == before


def test_a_corpus_of_which_nothing_is_left_says_why(tmp_path):
    (tmp_path / "b.jsonl").write_text("bad\n" * 3)
    with pytest.raises(ValueError, match=r"none; 3 records were skipped \(not a JSON object: 3\)"):
        make(str(tmp_path / "b.jsonl"), tmp_path / "bad", skip_damaged=3)
    source = write(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match=r"no documents are left .*dropped: \d+ by language\)"):
        make(source, tmp_path / "out", specs=["language:xx"])
