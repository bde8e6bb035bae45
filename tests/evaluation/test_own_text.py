"""The text of a run is found by its hash; the paths in its config are not followed."""

import json

import numpy as np
import pytest

from moe_jax import stores
from moe_jax.commands import evaluate
from moe_jax.data import prepare, tokenizers
from moe_jax.training import checkpoint
from tests import drawn
from tests.evaluation.test_evaluate import CONFIG, run


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    """A run with the hash of its held-out text, which is in the cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    lines = [json.dumps({"text": f"{n} and {n}"}) for n in range(9)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    held_out = prepare.open_corpus(
        str(tmp_path / "text.jsonl"),
        "validation",
        tokenizers.load("bytes"),
        validation_fraction=0.5,
        cache=tmp_path / "home" / "moe_jax",
    )
    params = drawn.parameters(CONFIG)
    stores.save(tmp_path / "run", CONFIG, params)
    data = {"step": 1, "text": {"validation": held_out.digest}}  # as a training run saves it
    monkeypatch.setattr(checkpoint, "newest_data", lambda directory, step: data)
    forge(tmp_path / "run", source=str(tmp_path / "text.jsonl"), validation_fraction=0.5)
    return tmp_path / "run"


def forge(workdir, **values):
    path = workdir / "config.json"
    config = json.loads(path.read_text())
    config["data"] |= values
    path.write_text(json.dumps(config))


def test_a_run_is_evaluated_on_its_own_text_without_its_files(workdir, monkeypatch, capsys):
    options = f"--checkpoint={workdir}", "--sequence_length=64", "--json"
    given = f"--source={workdir.parent / 'text.jsonl'}"
    expected = json.loads(run(monkeypatch, capsys, *options, given))
    (workdir.parent / "text.jsonl").unlink()
    found = json.loads(run(monkeypatch, capsys, *options))
    np.testing.assert_equal(found, expected)
    assert found["documents"] > 1


@pytest.mark.parametrize(
    ("forged", "complaint"),
    [
        ({"source": "/", "cache_dir": "made"}, "/, which its config names, is not read for it"),
        ({"source": "", "cache_dir": "made"}, "has no text of its own; give --source=TEXT"),
        ({"sequence_length": 10**9}, "has rows of 1000000000 tokens, not of 1 to 32768"),
        ({"sequence_length": 0}, "has rows of 0 tokens"),
    ],
)
def test_forged_values_read_and_write_nothing(forged, complaint, workdir, monkeypatch, capsys):
    monkeypatch.chdir(workdir)
    monkeypatch.setattr(evaluate.prepare, "open_corpus", None)
    for path in (workdir.parent / "home").rglob("manifest.json"):
        path.unlink()
    forge(workdir, **forged)
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, capsys, f"--checkpoint={workdir}")
    error = capsys.readouterr().err
    assert complaint in error and error.count("\n") == 1
    assert not (workdir / "made").exists()
