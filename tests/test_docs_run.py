"""The commands of README and docs/ do what the pages say: they are executed as they stand there.

Each page has a copy of the repository of its own, in which its commands run in order, also those
within sentences. What a reader has to provide (`path/to/dense`, `path/to/text`, …) is there: a tiny
model with a tokenizer, and some text. Three tables say what differs from a reader's machine:
`NUMBERS` and `CONFIG_FILES` make training short, and `NOT_HERE` names what a test cannot run, why,
and what tests it instead; `test_docs.py` checks that these commands exist with their options.
The cheap ones run by default, and whole pages with --long.
"""

import json
import lzma
import os
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from moe_jax import hf, model
from tests import pages

ROOT = pathlib.Path(__file__).parents[1]
PATH_VARIABLE = f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
NOT_HERE = {
    r"^git clone ": "needs the network",
    r"^pip install\b": "needs the network and changes the environment; see test_wheel.py",
    r"^sbatch ": "needs Slurm; see test_slurm.py",
    r"configs/experiments/": "trains for hours; see experiments/test_studies.py and test_rows.py",
    r"--launcher=slurm": "needs Slurm; see test_slurm.py",
    r"^tensorboard ": "a server that runs until it is stopped, of a package of its own",
    r"scripts/test\.sh": "is what runs this test",
    r"scripts/smollm2\.py": "downloads a model; see hf/test_scripts.py",
    r"--peer=(hf|transformers)": "needs PyTorch and Transformers",
    r"^from transformers import": "needs PyTorch and Transformers; see hf/test_transformers.py",
    r"--tasks=|scripts/harness\.py": "needs lm-evaluation-harness; see evaluation/test_harness.py",
    r"source=hf:": "needs the network; see data/test_hub.py",
    r"--tiktoken=": "needs a published vocabulary; see data/test_train_tokenizer.py",
    r"^(hf|wget|grep) |source=corpora/": "needs the network; see data/test_published_corpora.py",
    r"^source beam/|--runner=": "needs a venv with Beam; see data/test_beam_pipeline.py",
    r"configs/olmoe/1b_7b\.py --workdir": "needs OLMoE's corpora; see data/test_mixture.py",
    r"source=gs:": "needs a bucket; see data/test_stored.py",
    r"--coordinator=host0:": "needs a second host; see test_train_processes.py",
}
# The values of these options are replaced in all commands of train.py that train.
NUMBERS = {
    "--config.training.num_steps": 3,
    "--config.training.batch_size": 8,
    "--config.evaluation.batch_size": 8,
    "--config.evaluation.max_batches": 1,
    "--config.data.sequence_length": 128,  # a conversation has to fit
    "--config.optimizer.warmup_steps": 1,
}
# Commands without such options read these files; here in the copy, (pattern, replacement).
QUICK = [
    (r"num_steps(\W+)\d+", r"num_steps\g<1>2"),
    (r"batch_size = \d+", "batch_size = 8"),
    (r"warmup_steps = \d+", "warmup_steps = 1"),
    (r"max_batches = \d+", "max_batches = 1"),
    (r"sequence_length = \d+", "sequence_length = 64"),  # two segments of Lory
]
CONFIG_FILES = {"configs/quickstart.py": QUICK, "configs/sweeps/relatives.py": QUICK}
# A name that stands for any, and another number that makes a command short.
OTHER = {
    r"recipes\.py NAME": "recipes.py drop",
    r"(advise\.py --measure)": r"\1 --steps=3",
    r"stages=\(\(50,": "stages=((2,",
    r"(benchmark\.py train_step)$": r"\1 --repeats=1",
}
# Commands of about a second that write nothing: they run by default, in the repository itself.
CHEAP = (
    r"--help$|--list|--print_config|--reasons|scripts/(recipes|config_diff)\.py"
    r"|scripts/advise\.py(?! --measure)"
)


def not_here(command: str) -> bool:
    return any(re.search(pattern, command) for pattern in NOT_HERE)


def as_run(command: str) -> str:
    """The command with the replacements of the tables."""
    for pattern, replacement in OTHER.items():
        command = re.sub(pattern, replacement, command)
    if "scripts/train.py" in command and "--workdir" in command:
        for option, value in NUMBERS.items():
            command = re.sub(rf" {option}=\S+", "", command) + f" {option}={value}"
    return command


CHEAP_ONES = sorted(
    {
        as_run(command)
        for page in pages.WITH_COMMANDS
        for _, command in pages.commands(page)
        if re.search(CHEAP, command) and not not_here(command)
    }
)


def execute(command: str, language: str, folder: pathlib.Path, **environment: str) -> str:
    """Runs a command in the copy of the repository: what went wrong, or nothing."""
    devices = 8 if "--config.mesh." in command else 1
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={devices}")
    environment |= {"PYTHONPATH": str(folder), "XLA_FLAGS": flags, "PATH": PATH_VARIABLE}
    environment |= {"PYTHON": sys.executable}
    program = {"bash": ["bash", "-euo", "pipefail", "-c"], "python": ["python", "-c"]}[language]
    done = subprocess.run(
        [*program, as_run(command)],
        cwd=folder,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return f"{command}\n{done.stdout[-2000:]}" if done.returncode else ""


def virtual_environment(folder: pathlib.Path) -> None:
    """One that is installed already, by the stamp of scripts/venv.sh: that of these tests."""
    wanted = "cat requirements*.txt pyproject.toml | cksum"
    stamp = subprocess.run(wanted, shell=True, cwd=folder, capture_output=True, text=True).stdout
    for version in {"3.11", "{}.{}".format(*sys.version_info)}:
        venv = folder / ".venv" / version
        (venv / "bin").mkdir(parents=True)
        (venv / "installed-requirements").write_text(stamp)
        (venv / "bin" / "activate").write_text(f"PATH='{PATH_VARIABLE}'\n")


def tiny_model(folder: pathlib.Path) -> None:
    """A Hugging Face folder of a Llama, with a tokenizer of single bytes and a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {token: i for i, token in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = tokenizers.Tokenizer(models.BPE(ids, []))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    config = model.ModelConfig(
        vocab_size=len(ids),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        model_type="llama",
    )
    hf.save(folder, config, model.init(config, jax.random.key(0)))
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role[0] + m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}a{% endif %}"
    )


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the repository's files, with what the pages' readers have beside it."""
    folder = tmp_path_factory.mktemp("pages") / "moe_jax"
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file() and not name.startswith("tests/"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    for name, replacements in CONFIG_FILES.items():
        text = (folder / name).read_text()
        for pattern, replacement in replacements:
            text, number = re.subn(pattern, replacement, text)
            assert number, f"{name} has no {pattern}"
        (folder / name).write_text(text)
    virtual_environment(folder)
    (folder / "path" / "to" / "text").mkdir(parents=True)
    with lzma.open(ROOT / "moe_jax" / "data" / "corpora" / "lo_parallel19.jsonl.xz", "rt") as file:
        english = [r["text"] for r in map(json.loads, file) if r["lang"] == "en-us"]
    english = "\n".join(english)[:400_000]
    (folder / "path" / "to" / "text" / "help.txt").write_text(english)
    shutil.copytree(folder / "path" / "to" / "text", folder / "path" / "to" / "folder")
    (folder / "text.txt").write_text(english[:20_000])
    tiny_model(folder / "path" / "to" / "dense")
    experts = "--recipe=naive --num_experts=4 --num_experts_per_tok=2"
    for command in (
        "scripts/convert.py --source=path/to/dense --output=path/to/run --to=orbax",
        f"scripts/upcycle.py --source=path/to/dense --output=path/to/mixture {experts}",
    ):
        environment = {**os.environ, "PYTHONPATH": str(folder)}
        made = [sys.executable, *command.split()]
        subprocess.run(made, cwd=folder, env=environment, check=True)
    return folder


@pytest.mark.parametrize("command", CHEAP_ONES)
def test_a_cheap_command_of_the_pages_works(command):
    assert not execute(command, "bash", ROOT)


@pytest.mark.long
@pytest.mark.parametrize("page", pages.WITH_COMMANDS, ids=lambda page: page.name)
def test_the_commands_of_a_page_work_in_its_order(page, copy, tmp_path, request):
    commands = [(kind, text) for kind, text in pages.commands(page) if not not_here(text)]
    if any("--topology=v" in text for _, text in commands):
        request.getfixturevalue("libtpu")
    folder = tmp_path / "moe_jax"
    shutil.copytree(copy, folder, symlinks=True)
    shutil.rmtree(folder / ".venv")
    virtual_environment(folder)
    cache = {"XDG_CACHE_HOME": str(copy.parent / "cache")}
    for language, command in commands:
        assert not execute(command, language, folder, **cache)


def test_each_reason_not_to_run_a_command_is_needed():
    every = [text for page in pages.WITH_COMMANDS for _, text in pages.commands(page)]
    for table in (NOT_HERE, OTHER):
        for pattern in table:
            assert any(re.search(pattern, text) for text in every), pattern
