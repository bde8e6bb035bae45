"""The adapter of lm-evaluation-harness against our own scorer and the harness's own functions.

The harness is an optional extra of 740 MB: with --long it is installed into a folder of its own.
"""

import importlib.util
import json
import os
import pathlib
import random
import subprocess
import sys

import jax
import pytest

from moe_jax import model, stores
from moe_jax.data import tokenizers
from moe_jax.evaluation import scoring, task_lists
from moe_jax.evaluation.sampling import Sampling
from tests.evaluation.test_evaluate import CONFIG, run

ROOT = pathlib.Path(__file__).parents[2]
HAS_HARNESS = importlib.util.find_spec("lm_eval") is not None
needs_harness = pytest.mark.skipif(
    not HAS_HARNESS, reason="lm-evaluation-harness, an optional extra, is not installed"
)
TASK = """
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
doc_to_text: "{{context}}"
doc_to_target: answer
target_delimiter: ""
metadata: {version: 1.0}
"""
CHOICE = TASK + "task: mine\noutput_type: multiple_choice\ndoc_to_choice: choices\n"
SETTINGS = "generation_kwargs: {until: ['a'], max_gen_toks: 5}\n"
UNTIL = TASK + "task: until\noutput_type: generate_until\n" + SETTINGS
ITEMS = [
    {"context": "one ", "choices": ["two", "three"], "answer": 0},
    {"context": "A longer context:\n", "choices": [" a", " b", " cé"], "answer": 2},
]


@pytest.mark.long
@pytest.mark.skipif(HAS_HARNESS, reason="the harness is installed, and these tests run anyway")
def test_the_tests_of_this_file_with_the_harness_installed(tmp_path):
    packages = str(tmp_path / "packages")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", f"--target={packages}"]
    done = subprocess.run([*pip, "lm-eval==0.4.13"], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no harness: {done.stderr.strip().splitlines()[-1:]}")
    # Behind the project's own packages, so that nothing of them is replaced.
    (tmp_path / "sitecustomize.py").write_text(f"import sys; sys.path.append({packages!r})")
    tests = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", __file__]
    paths = {"PYTHONPATH": f"{ROOT}:{tmp_path}"}
    done = subprocess.run(tests, env=os.environ | paths, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert " 1 skipped" in done.stdout.splitlines()[-1]  # this one


def test_without_the_harness_its_tasks_are_refused_with_the_line_that_installs_it(
    monkeypatch, capsys
):
    monkeypatch.setattr(task_lists.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, capsys, "--checkpoint=nowhere", "--tasks=piqa")
    error = capsys.readouterr().err
    assert "pip install 'moe_jax[evaluation]'" in error and error.count("\n") == 1


def test_a_list_expands_once_and_names_what_is_missing():
    tasks, missing = task_lists.expand(["hellaswag", "drop_upcycling"])
    assert [task.name for task in tasks][:3] == ["hellaswag", "openbookqa", "triviaqa"]
    assert len({task.name for task in tasks}) == len(tasks) == 8
    assert tasks[0].shots is None and tasks[1].shots == 4
    assert any("NIILC" in line for line in missing)
    assert task_lists.expand(["piqa"]) == ([task_lists.Task("piqa")], [])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, and the YAML of a task of each kind."""
    folder = tmp_path_factory.mktemp("harness")
    os.environ["HF_HOME"] = str(folder / "home")
    init = jax.jit(lambda: jax.tree.map(lambda x: 5 * x, model.init(CONFIG, jax.random.key(0))))
    stores.save(folder / "model", CONFIG, init())
    (folder / "items.jsonl").write_text("\n".join(map(json.dumps, ITEMS)))
    (folder / "tasks").mkdir()
    for name, text in (("choice", CHOICE), ("until", UNTIL)):
        text = text.replace("DATA", json.dumps(str(folder / "items.jsonl")))
        (folder / "tasks" / f"{name}.yaml").write_text(text)
    return folder


@needs_harness
def test_the_harness_and_the_command_get_the_scores_of_our_own_scorer(folder, monkeypatch, capsys):
    import lm_eval
    from lm_eval.tasks import TaskManager

    from moe_jax.evaluation import harness

    harness.register(stores.subject)
    found = lm_eval.simple_evaluate(
        model="moe_jax",
        model_args={"checkpoint": str(folder / "model")},
        batch_size=4,
        tasks=["mine", "until"],
        task_manager=TaskManager(include_path=str(folder / "tasks"), include_defaults=False),
        bootstrap_iters=0,
    )
    subject = stores.subject(str(folder / "model"))
    for sample, item in zip(found["samples"]["mine"], ITEMS, strict=True):
        pairs = [scoring.pair(subject.tokenizer, item["context"], c) for c in item["choices"]]
        own = [(s.log_likelihood, s.is_greedy) for s in subject.score(pairs, progress=False)]
        theirs = [response[0] for response in sample["resps"]]
        assert [value for value, _ in theirs] == pytest.approx([v for v, _ in own], abs=1e-5)
        assert [flag for _, flag in theirs] == [flag for _, flag in own]
    options = f"--checkpoint={folder / 'model'}", f"--include_path={folder / 'tasks'}"
    shown = json.loads(run(monkeypatch, capsys, *options, "--tasks=mine,until", "--json"))
    assert shown["results"]["mine"]["acc,none"] == found["results"]["mine"]["acc,none"]
    assert shown["results"]["mine"]["n"] == 2 and shown["contexts_cut"] == 0
    assert "acc_norm" in task_lists.text(shown)
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, capsys, *options, "--tasks=mien")
    error = capsys.readouterr().err.splitlines()[-1]
    assert "did you mean mine?" in error and len(error) < 300


@needs_harness
def test_settings_of_generation_are_read_or_refused():
    from moe_jax.evaluation import harness

    found = harness._settings({"until": "\n", "max_gen_toks": 7, "do_sample": False})
    assert (found.num_tokens, found.stops, found.sampling) == (7, ("\n",), Sampling())
    assert harness._settings({"do_sample": True, "temperature": 0.5}).sampling.temperature == 0.5
    with pytest.raises(ValueError, match="generation with num_beams is not there"):
        harness._settings({"num_beams": 4})


@needs_harness
def test_texts_are_split_where_the_harness_splits_them():
    from lm_eval.api.model import TemplateLM

    tokenizer, draw = tokenizers.load("bytes"), random.Random(0)

    class Split(TemplateLM):
        eot_token_id = tokenizer.eos_id
        loglikelihood_rolling = generate_until = _loglikelihood_tokens = None

        def tok_encode(self, string, add_special_tokens=None, **_):
            return tokenizer.prompt(string).tolist()

    for _ in range(200):
        context, continuation = ("".join(draw.choices("ab \n", k=9)) for _ in range(2))
        if not context.strip():
            continue
        pair = scoring.pair(tokenizer, context, continuation)
        expected = Split()._encode_pair(context, continuation)
        assert (pair.context.tolist(), pair.continuation.tolist()) == expected


@needs_harness
def test_windows_are_those_of_the_harness():
    from lm_eval import utils

    for length in range(1, 30):
        for limit in range(1, 9):
            ids = list(range(length))
            theirs = map(
                utils.make_disjoint_window,
                utils.get_rolling_token_windows(ids, -1, limit, context_len=1),
            )
            ours = scoring.windows(scoring.np.array(ids), -1, limit)
            shown = [(pair.context.tolist(), pair.continuation.tolist()) for pair in ours]
            assert shown == list(theirs)


@needs_harness
@pytest.mark.parametrize("name", task_lists.TASK_LISTS)
def test_the_harness_has_every_task_of_a_list(name, manager):
    tasks, _ = task_lists.expand([name])
    assert {task.name for task in tasks} <= set(manager.all_tasks)


@pytest.fixture(scope="module")
def manager():
    from lm_eval.tasks import TaskManager

    return TaskManager()
