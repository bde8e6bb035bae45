"""A checkpoint is described without its values, verified with them, and compared with another."""

import json
import shutil
import sys

import jax
import jax.numpy as jnp
import pytest

from moe_jax.commands import inspect_checkpoint
from moe_jax.training import checkpoint


def state(value):
    keys = jax.random.split(jax.random.key(0), 2)
    params = {"a": jax.random.normal(keys[0], (4, 8)), "b": jnp.full((3,), value)}
    return {"params": params, "count": jnp.int32(7)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for name, value in (("one", 1.0), ("two", 2.0)):
        for step in (5, 10):
            how = {"data": {"skipped_steps": 0}, "config": {"seed": 3}}
            checkpoint.save(folder / name / "checkpoints", step, state(value), **how)
    return folder


def inspected(capsys, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["inspect_checkpoint.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        inspect_checkpoint.main()
    said = capsys.readouterr()
    return ended.value.code, said.out, said.err


def test_shapes_digests_data_and_config_are_shown_without_reading_values(runs, capsys, monkeypatch):
    monkeypatch.setattr(checkpoint, "_read", None)
    code, out, _ = inspected(capsys, monkeypatch, runs / "one", "--json")
    found = json.loads(out)
    assert code == 0 and (found["step"], found["config"]) == (10, {"seed": 3})
    assert found["leaves"]["params/a"]["shape"] == [4, 8]
    assert set(found["leaves"]) == {"params/a", "params/b", "count"}
    code, out, _ = inspected(capsys, monkeypatch, f"{runs / 'one'}@5")
    assert code == 0 and "checkpoints/5" in out and "35 parameters in 2 of 3 leaves" in out


def test_verifying_shows_norms_and_finds_damage(runs, tmp_path, capsys, monkeypatch):
    code, out, _ = inspected(capsys, monkeypatch, runs / "one", "--verify")
    assert code == 0 and "step 5 verifies" in out and "step 10 verifies" in out
    assert "norm 1.73205" in out  # three ones
    copy = shutil.copytree(runs / "two", tmp_path / "two")
    for path in (copy / "checkpoints/10").rglob("data.json"):  # of the newest
        path.unlink()
    code, _, err = inspected(capsys, monkeypatch, copy)
    assert code == 2 and "checkpoints/10 cannot be read: " in err
    code, out, _ = inspected(capsys, monkeypatch, copy, "--verify")
    assert code == 1 and "step 10 does not verify: " in out and "step 5 verifies" in out
    copy = shutil.copytree(runs / "two", tmp_path / "other")
    (copy / "checkpoints/5/state/manifest.ocdbt").unlink()
    code, out, _ = inspected(capsys, monkeypatch, copy, "--verify")
    assert code == 1 and "step 5 does not verify: " in out and "step 10 verifies" in out


def test_two_runs_are_compared_leaf_by_leaf(runs, capsys, monkeypatch):
    code, out, _ = inspected(capsys, monkeypatch, runs / "one", f"--diff={runs / 'two'}")
    assert code == 1 and "differs: params/b: other values" in out and "params/a: other" not in out
    one = runs / "one"
    code, out, _ = inspected(capsys, monkeypatch, f"{one}@5", f"--diff={one}@10")
    assert code == 0 and "no leaf differs" in out


def test_names_of_a_stranger_do_not_command_a_terminal(runs, tmp_path, capsys, monkeypatch):
    theirs = {"verified": 3, "differences": "yes", "checkpoint": "\x1b[2J"}
    for run, name in (("one", "\x1b[1m"), ("two", "\n")):
        shutil.copytree(runs / run, tmp_path / run)
        path = tmp_path / run / "checkpoints" / "10" / checkpoint.DESCRIPTION
        meta = json.loads(path.read_text())["description"]
        meta["data"] = theirs | {"step": 10}
        for of_leaves in (meta["leaves"], meta["digests"]):
            of_leaves[f"params/{name}"] = of_leaves.pop("params/a")
        path.write_text(json.dumps(checkpoint._sealed(meta)))
    code, out, _ = inspected(capsys, monkeypatch, tmp_path / "one", f"--diff={tmp_path / 'two'}")
    assert code == 1 and r"params/\x1b[1m" in out and "\x1b" not in out
    assert [line for line in out.splitlines() if r"differs: params/\n: only in" in line]
    code, out, _ = inspected(capsys, monkeypatch, tmp_path / "one", "--json")
    assert code == 0 and json.loads(out).keys() == {"checkpoint", "step", "leaves", "config"}


def test_a_step_that_is_not_there_is_refused_with_those_that_are(runs, capsys, monkeypatch):
    code, _, err = inspected(capsys, monkeypatch, f"{runs / 'one'}@7")
    assert code == 2 and "no checkpoint of step 7; it has 5, 10" in err
