"""Configs from files, flags and workdirs; keys that moved are refused with their new names."""

import json

import pytest

from moe_jax import config as configs
from moe_jax.config import environment
from moe_jax.config.reading import MOVED

FILE = """
from moe_jax import config as configs

def get_config(preset="quickstart"):
    config = configs.default()
    config.model.preset = preset
    {line}
    return config
"""


def file_with(tmp_path, line=""):
    path = tmp_path / "config.py"
    path.write_text(FILE.format(line=line))
    return str(path)


def keys_of(config, prefix=""):
    for name, value in config.items():
        if isinstance(value, dict):
            yield from keys_of(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def new_name(old):
    section = next(o for o in MOVED if old == o or old.startswith(f"{o}."))
    return MOVED[section] + old.removeprefix(section)


NEW = sorted(keys_of(configs.default().to_dict()))
# Every key below a section or key that moved, by its old name.
OLD = [
    old + key.removeprefix(new)
    for old, new in MOVED.items()
    for key in NEW
    if key == new or key.startswith(f"{new}.")
]


def test_a_file_a_flag_and_an_argument_are_read(tmp_path):
    path = file_with(tmp_path)
    config = configs.load(path, {"training.num_steps": 3, "balance.adaptive.rate": 0.5})
    assert (config.training.num_steps, config.balance.adaptive.rate) == (3, 0.5)
    assert configs.load(f"{path}:olmoe-1b-7b").model.preset == "olmoe-1b-7b"


@pytest.mark.parametrize("folder", ["runs 12:30", "a:b:c"])
def test_a_path_may_have_colons(folder, tmp_path):
    (tmp_path / folder).mkdir()
    path = file_with(tmp_path / folder)
    assert configs.load(path).model.preset == configs.load(file_with(tmp_path)).model.preset
    assert configs.load(f"{path}:olmoe-1b-7b").model.preset == "olmoe-1b-7b"


def test_none_unsets_a_key_that_need_not_be_set_and_no_other(tmp_path):
    path = file_with(tmp_path, "config.model.sliding_window = 64")
    assert configs.load(path, {"model.sliding_window": None}).model.sliding_window is None
    assert configs.load(path).model.sliding_window == 64
    with pytest.raises(configs.ConfigError, match="num_steps=None is not a whole number"):
        configs.load(path, {"training.num_steps": None})


def test_rules_of_paths_are_set_on_the_command_line(tmp_path):
    rules = (("moe/experts", 0.5), ("embed", 2))
    config = configs.load(file_with(tmp_path), {"optimizer.learning_rate_factors": rules})
    assert config.optimizer.learning_rate_factors == rules
    pairs = (("routing", 5), ("similarity", 0))
    config = configs.load(file_with(tmp_path), {"evaluation.intervals": pairs})
    assert configs.resolve(config).evaluation.intervals == pairs


def test_the_table_of_moves_leads_from_keys_that_are_gone_to_keys_that_are_there():
    assert len(OLD) == 20
    assert not set(OLD) & set(NEW)
    assert {new_name(old) for old in OLD} <= set(NEW)


@pytest.mark.parametrize("old", OLD)
def test_an_old_key_is_refused_with_its_new_name(old, tmp_path):
    moved = next(o for o in MOVED if old == o or old.startswith(f"{o}."))
    complaint = f"config.{moved} is config.{MOVED[moved]} now"
    with pytest.raises(configs.ConfigError) as by_flag:
        configs.load(file_with(tmp_path), {old: "0.5"})
    with pytest.raises(configs.ConfigError) as by_file:
        configs.load(file_with(tmp_path, f"config.{old} = 0.5"))
    assert str(by_flag.value) == str(by_file.value) == complaint

    stored = {}
    *sections, name = old.split(".")
    inner = stored
    for section in sections:
        inner = inner.setdefault(section, {})
    inner[name] = 0.5
    (tmp_path / "config.json").write_text(json.dumps(stored))
    with pytest.raises(configs.ConfigError) as by_json:
        configs.load_json(tmp_path)
    assert str(by_json.value) == f"{tmp_path}/config.json: {complaint}"
    with pytest.raises(configs.ConfigError) as by_checkpoint:
        environment.changes(stored, configs.default())
    assert str(by_checkpoint.value) == f"the config that was saved with the run: {complaint}"


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (
            "config.training.num_stps = 3",
            "'num_stps' is no key .* did you mean config.training.num_steps",
        ),
        ("config.objective.distilation.source = 'a'", "'distilation' is no key of a config"),
        ("raise ValueError('no such size')", "config.py: ValueError: no such size"),
        ("config.training.num_steps = 1.5", "num_steps"),
    ],
)
def test_a_mistake_in_a_file_is_one_short_line(line, complaint, tmp_path):
    with pytest.raises(configs.ConfigError, match=complaint) as error:
        configs.load(file_with(tmp_path, line))
    assert "\n" not in str(error.value) and len(str(error.value)) < 200 + len(str(tmp_path))


def test_a_missing_file_and_a_stray_argument_are_refused(tmp_path):
    for arguments, complaint in (
        ([], "--config=FILE is missing"),
        (["--config=no-such.py"], "--config=no-such.py: no such file"),
        ([f"--config={file_with(tmp_path)}", "stray"], "unexpected argument 'stray'"),
    ):
        with pytest.raises(configs.ConfigError, match=complaint):
            configs.parse(arguments)


def test_a_stored_value_of_another_type_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"training": {"num_steps": "many"}}')
    with pytest.raises(configs.ConfigError, match="config.json: .*num_steps"):
        configs.load_json(tmp_path)


@pytest.mark.parametrize("key", ["seed", "data.tokenizer", "balance.adaptive.beta"])
def test_a_stored_value_that_is_null_is_refused(key):
    *sections, name = key.split(".")
    values = {name: None}
    for section in reversed(sections):
        values = {section: values}
    with pytest.raises(configs.ConfigError, match=f"config.{key} is null"):
        configs.reading.stored(values)
    assert configs.reading.stored({"model": {"num_experts": None}}).model.num_experts is None


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"model": 3}, "config.model is 3; it must be a section of keys"),
        ({"init": {"upcycle": []}}, r"config.init.upcycle is \[\]; it must be a section of keys"),
        ({"data": {"source": {"a": 1}}}, "config.data.source is {'a': 1}; it must be a value, not"),
    ],
)
def test_a_section_and_a_value_do_not_take_each_others_place(values, complaint):
    with pytest.raises(configs.ConfigError, match=complaint):
        configs.reading.stored(values)


@pytest.mark.parametrize("content", ["", '{"seed": ', "[" * 9999, "\xff"])
def test_a_damaged_config_of_a_run_is_named(content, tmp_path):
    (tmp_path / "config.json").write_text(content, encoding="latin-1")
    with pytest.raises(configs.ConfigError, match=f"^{tmp_path}/config.json is not JSON: "):
        configs.load_json(tmp_path)


def test_fields_of_a_model_are_read_with_their_types():
    arguments = ["--model.num_experts=8", "--model.norm_topk_prob=false", "--model.layers=moe,moe"]
    fields = configs.model_fields(arguments)
    assert fields == {"num_experts": 8, "norm_topk_prob": False, "layers": ("moe", "moe")}
    with pytest.raises(ValueError, match="--model.expertise: a model's config has no such field"):
        configs.model_fields(["--model.expertise=8"])
