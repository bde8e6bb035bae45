"""A misspelt name is answered with the right one, wherever a person may write a name."""

import subprocess

import pytest

from moe_jax import config, spelling
from moe_jax.command_line import Parser
from moe_jax.config import ConfigError
from moe_jax.model.presets import PRESETS
from moe_jax.upcycle import recipes

QUICKSTART = "--config=configs/quickstart.py"


@pytest.mark.parametrize(
    ("name", "names", "near"),
    [
        ("num-experts", ("num_experts", "experts"), "num_experts"),
        ("LR", ("loss_rate_factor", "learning_rate"), "learning_rate"),
        ("num_layers", ("layers", "num_hidden_layers"), "num_hidden_layers"),
        ("n_layers", ("layers", "num_hidden_layers"), "num_hidden_layers"),
        ("top_k", ("top_p", "num_experts_per_tok"), "num_experts_per_tok"),
        ("olmo", PRESETS, "olmoe-1b-7b"),
        ("dorp", recipes.RECIPES, "drop"),
        ("xyzzy", recipes.RECIPES, None),
    ],
)
def test_the_name_that_was_meant(name, names, near):
    assert spelling.nearest(name, names) == near


@pytest.mark.parametrize(
    ("argument", "meant"),
    [
        ("--config.optimizer.lr=1", "config.optimizer.learning_rate?"),
        ("--config.training.warmup_steps=3", "config.optimizer.warmup_steps?"),
        ("--config.model.num_layers=2", "config.model.num_hidden_layers?"),
        ("--config.opt.learning_rate=1", "config.optimizer.learning_rate?"),
        ("--config.seeed=1", "config.seed?"),
        ("--config.init.upcycle.ration=1", "config.init.upcycle.ratio?"),
        ("--training.num_steps=3", "--config.training.num_steps?"),
        ("--num-experts=3", "--config.model.num_experts?"),
        ("--config.training.num_steps=1e3", "use 1000"),
        ("--config.training.num_steps=many", "is not a whole number"),
        ("--config.optimizer.learning_rate=high", "is not a number"),
        ("--config.training.xyzzy=3", "--list_keys shows all"),
        ("--batch_size=3", "--config.evaluation.batch_size or --config.training.batch_size?"),
        ("--config.training.batch-size=3", "did you mean config.training.batch_size?"),
        (
            "--config.training.load_balancing_over=device",
            "is config.balance.load_balancing_over now",
        ),
    ],
)
def test_a_config_key_that_does_not_exist_is_answered_with_the_one_that_was_meant(argument, meant):
    with pytest.raises(ConfigError) as refusal:
        config.parse([QUICKSTART, argument])
    assert str(refusal.value).endswith(meant)


def test_a_config_file_that_sets_an_unknown_key_is_answered_likewise(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from moe_jax import config as configs\n\n"
        "def get_config():\n    config = configs.default()\n    config.optimizer.lr = 1.0\n"
    )
    with pytest.raises(ConfigError, match=r"'lr' is no key.*config\.optimizer\.learning_rate\?"):
        config.parse([f"--config={file}"])


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--num-experts=4"], "--num-experts is no option; did you mean --num_experts?"),
        (["--recipe=dorp"], "--recipe='dorp' is unknown: did you mean 'drop'? Use one of drop"),
        (["moe_layr"], "NAME='moe_layr' is unknown: did you mean 'moe_layer'?"),
    ],
)
def test_a_misspelt_option_is_answered_before_one_that_is_missing(arguments, line, capsys):
    parser = Parser("")
    parser.add_argument("name", metavar="NAME", choices=("moe_layer", "remat"))
    parser.add_argument("--num_experts", type=int)
    parser.add_argument("--recipe", choices=("drop", "naive"))
    with pytest.raises(SystemExit) as end:
        parser.parse_args(arguments if arguments[0][0] != "-" else [*arguments, "remat"])
    assert end.value.code == 2 and line in capsys.readouterr().err


def test_a_model_field_and_a_recipes_parameter_are_answered_with_their_prefixes():
    with pytest.raises(ValueError, match=r"no such field; did you mean layers\?"):
        config.model_fields(["--model.layer=dense"])
    with pytest.raises(ValueError, match=r"it takes ratio, .*; did you mean ratio\?"):
        recipes.check("drop", {"ration": 0.5})


def test_the_quickstart_takes_no_argument_but_help():
    command = ["bash", "scripts/quickstart.sh", "--hlep"]
    end = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert end.returncode == 2 and "--help" in end.stderr
