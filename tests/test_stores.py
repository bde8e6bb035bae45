"""A model is named by a folder or RUN@STEP, and one with values that are not finite is refused."""

import importlib.util
import json
import shutil
import sys

import jax
import jax.numpy as jnp
import pytest

from moe_jax import cards, hf, init, model, stores, train, tree
from moe_jax import config as configs
from moe_jax.commands import collect_statistics, config_diff, convert, evaluate, generate, upcycle
from moe_jax.config import environment
from moe_jax.parallel import mesh as meshes
from moe_jax.training import checkpoint

MODEL = model.ModelConfig(
    vocab_size=259,
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    max_position_embeddings=64,
    remat="none",
)
UP = "blocks/0/mlp/up"


def save_step(run, params, step):
    config = configs.load_json(run)
    config.seed = step  # so that the checkpoints' configs differ
    how = {"data": {}, "config": config.to_dict()}
    checkpoint.save(run / "checkpoints", step, {"params": params}, **how)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The run `run` with steps 0, 2 and 4; `nan_run` and the folder `nan_hf` with three NaNs."""
    root = tmp_path_factory.mktemp("stores")
    (root / "text.txt").write_text("one and two are three\n" * 50)
    params = jax.jit(lambda: model.init(MODEL, jax.random.key(0)))()
    stores.save(root / "run", MODEL, params)
    for step in (2, 4):
        save_step(root / "run", jax.tree.map(lambda x, step=step: x + step, params), step)
    hf.save(root / "hf", MODEL, params)
    leaves = tree.flatten(params)
    bad = tree.unflatten({**leaves, UP: leaves[UP].at[0, 1, 2:5].set(jnp.nan)})
    stores.save(root / "nan_run", MODEL, bad)
    hf.save(root / "nan_hf", MODEL, bad)
    return root


def added(source):
    """The number that was added to the run's first parameters."""
    _, params = stores.load(source, meshes.one_device())
    return float(params["final_norm"]["scale"][0]) - 1


@pytest.mark.parametrize(
    ("name", "shown", "number"),
    [("run@2", "run@2", 2), ("run@4", "run@4", 4), ("run", "run", 4), ("ru@2", "run@2", 2)],
)
def test_a_step_names_its_checkpoint_and_none_the_newest(name, shown, number, root):
    found = stores.find(str(root / name))
    assert (str(found), found.name) == (str(root / shown), shown)
    assert added(found) == number


def test_a_folder_that_has_such_a_name_is_meant_itself(root, tmp_path):
    shutil.copytree(root / "run", tmp_path / "run@2")
    found = stores.find(str(tmp_path / "run@2"))
    assert found.step is None and added(found) == 4
    assert added(stores.find(str(tmp_path / "run@2@2"))) == 2


def unlink(run):
    next((run / "checkpoints" / "2").rglob("manifest.ocdbt")).unlink()


def rename(run):
    shutil.rmtree(run / "checkpoints" / "2")
    shutil.copytree(run / "checkpoints" / "4", run / "checkpoints" / "2")


@pytest.mark.parametrize("damage", [unlink, rename])
def test_a_step_that_does_not_verify_is_refused_with_those_that_there_are(damage, root, tmp_path):
    run = shutil.copytree(root / "run", tmp_path / "run")
    damage(run)
    with pytest.raises(ValueError, match="checkpoints/2 does not verify: .*the steps 0, 2, 4$"):
        added(stores.find(f"{run}@2"))
    assert added(stores.find(str(run))) == 4


@pytest.mark.parametrize("name", ["3", "0003", "³"])
def test_a_link_or_an_oddly_named_folder_is_no_step(name, root, tmp_path):
    run = shutil.copytree(root / "run", tmp_path / "run")
    if name == "3":
        (run / "checkpoints" / name).symlink_to("4")
    else:
        shutil.copytree(run / "checkpoints" / "4", run / "checkpoints" / name)
    with pytest.raises(ValueError, match="no checkpoint of step 3; it has 0, 2, 4|it is not there"):
        stores.find(f"{run}@{name}")


# The arguments of each command that reads a model, without the model itself.
COMMANDS = {
    generate: ("--checkpoint={}", "--prompt=a", "--num_tokens=1", "--tokenizer=bytes"),
    evaluate: ("--checkpoint={}", "--source={root}/text.txt", "--tokenizer=bytes"),
    convert: ("--source={}", "--output={out}", "--to=orbax"),
    upcycle: ("--source={}", "--output={out}", "--recipe=naive", "--num_experts=2"),
    collect_statistics: (
        *("--source={}", "--text={root}/text.txt", "--output={out}", "--tokenizer=bytes"),
        *("--num_batches=1", "--batch_size=1", "--sequence_length=16", "--num_experts=2"),
    ),
}
TO_HF = ("--source={}", "--output={out}", "--to=hf")
CASES = [*COMMANDS.items(), (convert, TO_HF)]
NAMES = [f"{c.__name__.rpartition('.')[2]}-{a[-1]}" for c, a in CASES]
ALL_CASES = pytest.mark.parametrize(("command", "arguments"), CASES, ids=NAMES)


def run(command, arguments, source, root, out, monkeypatch):
    """The exit status of a command."""
    given = [argument.format(source, root=root, out=out) for argument in arguments]
    monkeypatch.setattr(sys, "argv", [command.__name__, *given])
    try:
        command.main()
    except SystemExit as ended:
        return ended.code or 0
    return 0


@ALL_CASES
@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("run@3", "run has no checkpoint of step 3; it has 0, 2, 4"),
        ("hf@2", "hf is a Hugging Face folder, which has no steps: leave @2 out"),
        ("nan_run", f"nan_run: 3 values of {UP} are not finite; "),
        ("nan_hf", "nan_hf: 3 values of model.layers.0.mlp.up_proj.weight are not finite; "),
    ],
)
def test_every_command_refuses_it_in_one_line(
    command, arguments, source, complaint, root, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "out"
    assert run(command, arguments, root / source, root, out, monkeypatch) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert complaint in last
    assert source.startswith("nan") == ("or allow them by --allow_nonfinite, " in last)
    assert not out.exists()


SLOW = {generate, evaluate, collect_statistics}  # they compile


@pytest.mark.parametrize(
    ("command", "arguments"),
    [pytest.param(*case, marks=[pytest.mark.long] * (case[0] in SLOW)) for case in CASES],
    ids=NAMES,
)
@pytest.mark.parametrize(
    ("source", "line"),
    [
        ("nan_run", f"nan_run: 3 values of {UP} are not finite: this is allowed"),
        ("nan_hf", "nan_hf: 3 values of model.layers.0.mlp.up_proj.weight are not finite: this"),
    ],
)
def test_what_is_allowed_is_said_once_and_used(
    command, arguments, source, line, root, tmp_path, monkeypatch, capsys
):
    out, arguments = tmp_path / "out", (*arguments, "--allow_nonfinite")
    assert run(command, arguments, root / source, root, out, monkeypatch) == 0
    assert [line in said for said in capsys.readouterr().err.splitlines()].count(True) == 1
    if command is convert:
        _, params = stores.load(out, meshes.one_device(), allow_nonfinite=True)
        assert int(jnp.isnan(params["blocks"]["0"]["mlp"]["up"]).sum()) == 3


def test_all_of_many_tensors_are_counted_and_some_are_named(root, tmp_path):
    config, params = stores.load(root / "run", meshes.one_device())
    stores.save(tmp_path / "run", config, jax.tree.map(lambda x: x / 0, params))
    number = len(jax.tree.leaves(params))
    with pytest.raises(ValueError, match=f"8 values of .* and others of {number - 8} more are not"):
        stores.load(tmp_path / "run", meshes.one_device())


@pytest.mark.parametrize("key", ["init.source", "objective.distillation.source"])
def test_a_run_is_refused_unless_it_allows_what_its_parent_or_teacher_has(key, root, capsys):
    config = configs.default()
    config.init.source = str(root / "run")
    config.update_from_flattened_dict({key: str(root / "nan_run")})
    if key != "init.source":
        config.objective.distillation.coefficient = 0.5

    def loaded():
        settings, mesh = configs.resolve(config), meshes.one_device()
        return init.parameters(settings, mesh, None), train._frozen_models(settings, mesh)

    with pytest.raises(configs.ConfigError, match=f"3 values of {UP} .*init.allow_nonfinite=True"):
        loaded()
    config.init.allow_nonfinite = True
    assert loaded()
    assert "this is allowed" in capsys.readouterr().err
    config.init.source, config.objective.distillation.source = "", ""
    config.objective.distillation.coefficient, config.model.preset = 0.0, "quickstart"
    with pytest.raises(configs.ConfigError, match="allow_nonfinite=True .*config.init.source"):
        configs.resolve(config)


@pytest.mark.parametrize("key", ["init.source", "objective.distillation.source"])
def test_a_run_is_refused_before_it_starts_if_a_step_is_not_there(key, root):
    config = configs.default()
    config.init.source = str(root / "run")
    config.mesh.update(data=-1, fsdp=1)
    config.update_from_flattened_dict({key: f"{root / 'run'}@3"})
    config.objective.distillation.coefficient = 0.0 if key == "init.source" else 0.5
    with pytest.raises(configs.ConfigError, match=f"config.{key}=.* no checkpoint of step 3; it"):
        environment.validate_environment(configs.resolve(config), jax.device_count())


def test_a_run_starts_from_the_step_and_records_it(root, tmp_path):
    config = configs.default()
    config.init.source = f"{root / 'run'}@2"
    settings, mesh = configs.resolve(config), meshes.one_device()
    params = init.parameters(settings, mesh, None)
    assert float(params["final_norm"]["scale"][0]) == 3
    of_step = init.lineage(settings.init.sources)
    per_step = configs.load_json(root / "run").training.batch_size * 64
    assert (of_step["parents"], of_step["tokens"]) == ([f"{root / 'run'}@2"], 2 * per_step)
    newest = init.lineage((configs.source_of(str(root / "run")),))
    assert (newest["parents"], newest["tokens"]) == ([f"{root / 'run'}@4"], 4 * per_step)
    assert newest["device_seconds"] is None  # the checkpoints do not say it


def test_a_run_that_several_parents_come_from_counts_once(root, tmp_path):
    """Two branches of one parent: the parent's tokens are spent once, as its FLOPs are."""
    base = configs.source_of(str(root / "run"))
    behind = init.lineage((base,))
    per_step, kept = behind["tokens"] // 4, {"lineage": behind}
    for seed, name in enumerate(("one", "two"), start=7):
        shutil.copytree(root / "run", tmp_path / name)
        config = configs.load_json(tmp_path / name)
        config.seed = seed
        configs.save_json(config, tmp_path / name)
        _, params = stores.load(base, meshes.one_device())
        how = {"data": kept, "config": config.to_dict()}
        checkpoint.save(tmp_path / name / "checkpoints", 6, {"params": params}, **how)
    one, two = (configs.source_of(str(tmp_path / name)) for name in ("one", "two"))
    both = init.lineage((one, two))
    assert both["tokens"] == (4 + 6 + 6) * per_step
    assert both["training_flops"] == behind["training_flops"] / 4 * (4 + 6 + 6)
    assert both["parents"] == [f"{tmp_path / name}@6" for name in ("one", "two")]
    early = configs.Source(base.folder, 2)
    assert init.lineage((early, one))["tokens"] == (4 + 6) * per_step

    # The checkpoints of older versions keep the sums and the parents' names.
    kept["lineage"] = {key: value for key, value in behind.items() if key != "runs"}
    for branch in (one, two):
        shutil.rmtree(branch.folder / "checkpoints" / "6")
        how = {"data": kept, "config": configs.load_json(branch.folder).to_dict()}
        checkpoint.save(branch.folder / "checkpoints", 6, {"params": params}, **how)
    assert init.lineage((one, two))["tokens"] == (4 + 6 + 6) * per_step


def test_the_config_in_a_checkpoint_is_compared(root, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["config_diff", f"{root / 'run'}@2", f"{root / 'run'}@4"])
    config_diff.main()
    assert capsys.readouterr().out == "seed: 2 -> 4\n"


def test_the_card_of_a_converted_step_names_it(root):
    page = cards.of_conversion(MODEL, configs.source_of(f"{root / 'run'}@2"), ["convert"])
    assert "converted from `run@2`" in page and "| training | 2 steps, " in page


def test_a_stored_directory_of_checkpoints_is_followed_only_if_the_person_names_it(
    tmp_path, monkeypatch
):
    """The config in a workdir may be a stranger's."""
    (tmp_path / "run").mkdir()
    stored = {"checkpoint": {"directory": str(tmp_path / "elsewhere")}}
    (tmp_path / "run" / "config.json").write_text(json.dumps(stored))
    source = configs.Source(tmp_path / "run")
    with pytest.raises(configs.ConfigError, match="keeps its checkpoints in .*elsewhere; set MOE"):
        source.steps()
    monkeypatch.setenv("MOE_JAX_CHECKPOINTS", str(tmp_path))
    with pytest.raises(configs.ConfigError, match="keeps its checkpoints in"):
        source.steps()
    monkeypatch.setenv("MOE_JAX_CHECKPOINTS", str(tmp_path / "elsewhere"))
    (tmp_path / "elsewhere" / "run" / "7").mkdir(parents=True)
    assert source.steps() == [7]


@pytest.mark.parametrize(("scheme", "named"), [("s3", "mount the s3 bucket"), ("gs", "gcsfs")])
def test_a_bucket_that_cannot_be_reached_is_named(scheme, named, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(configs.ConfigError, match=named):
        configs.checkpoints_of(tmp_path / "run", f"{scheme}://bucket/runs")
    assert str(configs.checkpoints_of(tmp_path / "run", "other")) == "other/run"
