"""Settings that this machine, or the run that goes on in a workdir, does not allow."""

import dataclasses
import json
import subprocess

import pytest
import tokenizers

from moe_jax import config as configs
from moe_jax.config import environment, monitoring, objectives, section, sections
from moe_jax.model.presets import PRESETS

RUN = configs.Run(model=PRESETS["quickstart"], data=configs.Data(tokenizer="bytes"))


def config_of(**keys):
    config = configs.default()
    config.model.preset = "quickstart"
    config.update_from_flattened_dict(keys)
    return config


FIXED = {
    "seed": 9,
    "training.batch_size": 64,
    "model.router": "topk_softmax",
    "data.source": "tfds:lm1b",
    "data.text_field": "content",
    "data.label_field": "domain",
    "data.label_pattern": "([a-z]+)",
    "data.sequence_length": 64,
    "data.packing": "best_fit",
    "data.conversations": True,
    "lora.rank": 2,
    "lora.alpha": 8.0,
    "lora.targets": "up$",
    "data.document_mask": False,
    "data.reset_positions": False,
    "data.validation_fraction": 0.3,
}


def test_the_fixed_keys_are_these():
    assert environment.fixed_keys() == set(FIXED)


def test_a_key_of_the_data_is_fixed_unless_it_says_otherwise():
    @dataclasses.dataclass(frozen=True)
    class Filter(section.Section, path="data.filter"):
        pattern: str = section.key("", "documents to leave out")

    @dataclasses.dataclass(frozen=True)
    class Data(configs.Data, path="data", fixed=configs.Data.fixed):
        mask: str = section.key("document", "tokens that a token sees")
        workers: int = section.key(1, "threads that read", fixed=False)
        filter: Filter = section.part(Filter)

    new = environment.fixed_keys(Data) - environment.fixed_keys(configs.Data)
    assert new == {"data.mask", "data.filter.pattern"}


def test_a_text_that_changed_in_its_place_is_refused_by_its_split():
    before = {"train": "a", "validation": "b"}
    assert not environment.changed_text(before, before, RUN)
    assert not environment.changed_text({}, before, RUN)  # of a checkpoint that holds no digests
    with pytest.raises(configs.ConfigError, match="'embedded' .* another validation text"):
        environment.changed_text(before, {"train": "a", "validation": "c"}, RUN)


def test_batches_that_are_no_longer_named_are_said_to_stay_left_out():
    before, config = configs.default(), configs.default()
    before.data.skip_batches = ((3, 5), (7, 7))
    config.data.skip_batches = ((7, 7),)
    stored = json.loads(json.dumps(before.to_dict()))
    [line] = environment.changes(stored, config)
    assert line.endswith("-> ((7, 7),), but (3, 5) stay left out")
    [line] = environment.changes(config.to_dict(), before)
    assert line.endswith("-> ((3, 5), (7, 7))")


def test_another_text_and_another_source_are_allowed_by_one_key():
    data = configs.Data(tokenizer="bytes", other_text=True)
    run = dataclasses.replace(RUN, data=data)
    before, now = {"train": "a", "validation": "b"}, {"train": "a", "validation": "c"}
    assert environment.changed_text(before, now, run) == ["the validation text is another"]
    config = configs.default()
    config.data.update(source="other.txt", other_text=True)
    lines = environment.changes(configs.default().to_dict(), config)
    assert "data.source: embedded -> other.txt" in lines
    config.data.sequence_length = 64
    with pytest.raises(configs.ConfigError, match="data.sequence_length=64 differs"):
        environment.changes(configs.default().to_dict(), config)


def test_the_key_that_changed_the_text_is_named_and_not_the_text():
    config = configs.default()
    config.data.validation_fraction = 0.3
    run = dataclasses.replace(RUN, config=config)
    kept = {"text": {"train": "a"}, "versions": {}}
    with pytest.raises(configs.ConfigError, match="data.validation_fraction=0.3 differs"):
        environment.changes_since(configs.default().to_dict(), kept, run, {"train": "b"})


def test_a_program_of_another_version_is_named():
    now = environment.versions()
    assert environment.changed_versions(now) == []
    before = now | {"jax": "0.1"}
    assert environment.changed_versions(before) == [f"jax: 0.1 -> {now['jax']}"]


@pytest.mark.parametrize("key", FIXED)
def test_what_makes_another_run_may_not_change(key):
    with pytest.raises(configs.ConfigError, match=f"config.{key}=.* differs from the .* began"):
        environment.changes(config_of().to_dict(), config_of(**{key: FIXED[key]}))


def test_other_changes_are_named():
    before = config_of(**{"evaluation.prompts": ("a",)}).to_dict()
    before["evaluation"]["prompts"] = ["a"]  # as it comes out of JSON
    del before["objective"]  # a key that the run did not know had its default
    after = config_of(
        **{"evaluation.prompts": ("a",), "training.num_steps": 5, "objective.name": "other"}
    )
    assert environment.changes(before, after) == [
        "objective.name: next_token -> other",
        "training.num_steps: 1000 -> 5",
    ]


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"mesh": sections.Mesh(data=3)}, "config.mesh data=3, .* does not fit 8 device"),
        ({"training": sections.Training(batch_size=12)}, "batch_size .*=12 is not divisible by"),
        (
            {"training": sections.Training(batch_size=16, accumulation_steps=4)},
            r"batch_size \(over accumulation_steps\)=4 is not divisible by the 8 batch shards",
        ),
        ({"evaluation": monitoring.Evaluation(batch_size=9)}, "evaluation.batch_size=9 is not div"),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices_or_the_batch_is_refused(values, complaint):
    environment.validate_mesh(RUN, 8)
    with pytest.raises(configs.ConfigError, match=complaint):
        environment.validate_mesh(dataclasses.replace(RUN, **values), 8)


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"data": configs.Data(source="does/not/exist")}, "matches no file"),
        (
            {"data": configs.Data(source="tfds:")},
            "config.data.source='tfds:' names no dataset",
        ),
        ({"data": configs.Data(tokenizer="does/not/exist")}, "does/not/exist"),
        ({"init": sections.Init(source="runs/none")}, "config.init.source='runs/none' has no ch"),
        (
            {
                "objective": objectives.Objective(
                    distillation=objectives.Distillation(source="runs/none", coefficient=1.0)
                )
            },
            "config.objective.distillation.source='runs/none' has no checkpoints",
        ),
        (
            {"model": dataclasses.replace(RUN.model, vocab_size=100)},
            "config.model.vocab_size=100 is less than the 259 of tokenizer 'bytes'; set it to 259",
        ),
        (
            {
                "model": dataclasses.replace(RUN.model, position_embedding="learned"),
                "evaluation": monitoring.Evaluation(prompts=("text",), continuation_tokens=4092),
            },
            "evaluation.prompts: rows of 4097 tokens are beyond .*4096.*continuation_tokens",
        ),
    ],
)
def test_what_this_machine_does_not_have_is_refused(values, complaint):
    environment.validate_environment(RUN, 8)
    with pytest.raises(configs.ConfigError, match=complaint):
        environment.validate_environment(dataclasses.replace(RUN, **values), 8)


def test_the_largest_id_of_a_tokenizer_decides_not_the_number_of_its_tokens(tmp_path):
    words = {"<s>": 0, "</s>": 1, "a": 300}
    path = tmp_path / "tokenizer.json"
    tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="a")).save(str(path))
    run = dataclasses.replace(RUN, data=configs.Data(tokenizer=str(path)))
    with pytest.raises(configs.ConfigError, match="vocab_size=259 is less than the 301 of"):
        environment.validate_environment(run, 8)
    model = dataclasses.replace(RUN.model, vocab_size=301)
    environment.validate_environment(dataclasses.replace(run, model=model), 8)


def test_the_commit_is_dirty_if_the_package_differs_and_not_if_rows_do(tmp_path, monkeypatch):
    def git(*arguments):
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", str(tmp_path), *who, *arguments], check=True)

    (tmp_path / "moe_jax").mkdir()
    code, rows = tmp_path / "moe_jax" / "__init__.py", tmp_path / "cpu.jsonl"
    code.write_text("")
    rows.write_text("")
    monkeypatch.setattr(environment.moe_jax, "__file__", str(code))
    assert environment.commit() == ""
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    name = environment.commit()
    assert len(name) >= 7 and not name.endswith("-dirty")
    rows.write_text("{}")
    assert environment.commit() == name
    code.write_text("changed = True")
    assert environment.commit() == f"{name}-dirty"
