"""Continues prompts with a model.

Examples:
  python scripts/generate.py --checkpoint=runs/quickstart/dense --prompt="To insert a table, "
  python scripts/generate.py --checkpoint=path/to/folder --prompt="The capital of France is" \\
      --prompt="Water boils at" --num_tokens=32 --temperature=0.7 --top_p=0.9
  python scripts/generate.py --checkpoint=path/to/folder --prompt="The capital of France is" \\
      --offload=0.5                          (a mixture that is larger than memory)
  python scripts/generate.py --checkpoint=path/to/folder --prompt="Once upon a time" \\
      --temperature=1 --samples=4 --output=generated.jsonl
  python scripts/generate.py --checkpoint=path/to/folder --chat            (a conversation)
  python scripts/generate.py --checkpoint=path/to/folder --chat --messages=talks.jsonl \\
      --output=answers.jsonl

The checkpoint is a Hugging Face folder (with its tokenizer.json or tokenizer.model) or a run's
workdir. Temperature 0, the default, takes the most likely token each time. A text ends at an
end token of generation_config.json, or else of config.json, or else of the tokenizer. --output
writes a line {"prompt", "text"} for each text, which evaluate.py --generated reads.

--chat puts what is said into the folder's chat template, answers line by line, and begins anew at
the line /reset; the conversation ends with the input (Ctrl-D). The settings of sampling that are
not given are those of generation_config.json. --messages answers the conversations of a .jsonl
file instead: each record has "messages", ShareGPT's "conversations" or "prompt", and "tools" if the
template describes any.
"""

import contextlib
import dataclasses
import functools
import io
import math
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np

from moe_jax import command_line, files, model, stores, strict_json, untrusted
from moe_jax import config as configs
from moe_jax.data import chat, chat_template, tokenizer_files, tokenizers
from moe_jax.evaluation import chatting, generate, json_lines, sampling
from moe_jax.evaluation.sampling import GREEDY, Sampling
from moe_jax.hf import folders, offload
from moe_jax.parallel import mesh

NUM_TOKENS, CHAT_TOKENS = 64, 512
# Setting -> its type and its help.
SAMPLING = {
    "temperature": (float, "0, the default, takes the most likely token"),
    "top_k": (int, "sample from this number of the most likely tokens"),
    "top_p": (float, "sample from the most likely tokens with this total probability"),
    "min_p": (float, "sample from tokens with this share of the highest probability"),
    "repetition_penalty": (float, "more than 1 makes the tokens of a text less likely in it"),
}


def main() -> None:
    parser = command_line.Parser(__doc__)
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="DIR",
        help="a run's workdir, RUN@STEP or a Hugging Face folder",
    )
    text = "a text to continue; can be given several times"
    parser.add_argument("--prompt", action="append", metavar="TEXT", help=text)
    parser.add_argument(
        "--chat", action="store_true", help="answer in the form of the folder's chat template"
    )
    talks = 'a .jsonl file of conversations to answer, with --chat; "-" is the standard input'
    parser.add_argument("--messages", metavar="FILE", help=talks)
    system = "a system message, with --chat"
    parser.add_argument("--system", default="", metavar="TEXT", help=system)
    parser.add_argument(
        "--num_tokens",
        type=int,
        help="number of tokens to generate (default: 64, and with --chat at most 512)",
    )
    for name, (kind, words) in SAMPLING.items():
        parser.add_argument(f"--{name}", type=kind, metavar="X", help=words)
    parser.add_argument("--seed", type=command_line.seed, default=0, help="seed for sampling")
    number = "texts to sample for each prompt; the seeds of the later ones follow --seed"
    parser.add_argument("--samples", type=int, default=1, help=number)
    parser.add_argument(
        "--output", type=pathlib.Path, metavar="FILE", help="a .jsonl file to write the texts to"
    )
    parser.add_argument("--tokenizer", help="a tokenizer to use instead of the model's own")
    parser.add_argument(
        "--offload",
        type=float,
        metavar="GB",
        help="keep at most this many GB of the experts in memory, and the others in the Hugging "
        "Face folder or, with an accelerator, in the host's memory (default: keep all)",
    )
    parser.add_argument("--allow_nonfinite", **stores.ALLOW_NONFINITE)
    arguments = parser.parse_args()
    with parser.refusing():
        _check(arguments)
        if arguments.chat:
            _chat(arguments)
        else:
            _show(arguments, run(arguments))


def _check(arguments) -> None:
    """Raises: ValueError for options that do not fit together."""
    sampling.check(_sampling(arguments))
    if arguments.num_tokens is not None and arguments.num_tokens < 1:
        raise ValueError(f"--num_tokens={arguments.num_tokens} must be at least 1")
    if arguments.offload is not None and not 0 < arguments.offload < math.inf:
        raise ValueError(f"--offload={arguments.offload} must be more than 0")
    if arguments.samples < 1 or (arguments.samples > 1 and not arguments.temperature):
        raise ValueError(
            f"--samples={arguments.samples}: use at least 1, and 1 with --temperature=0, which "
            "always gives the same text"
        )
    if arguments.output is not None and not arguments.output.parent.is_dir():
        raise ValueError(f"--output={arguments.output}: its folder does not exist; make it")
    if arguments.chat and (arguments.prompt or arguments.samples > 1):
        raise ValueError("--chat has no --prompt and no --samples; give --messages=FILE")
    if not arguments.chat and (arguments.messages or arguments.system):
        raise ValueError("--messages and --system are for --chat; add it")
    if not arguments.chat and not arguments.prompt:
        raise ValueError("give a text by --prompt, or --chat for a conversation")
    if arguments.output and arguments.chat and not arguments.messages:
        raise ValueError("--output with --chat needs --messages=FILE")


def _sampling(arguments, otherwise: Sampling = GREEDY) -> Sampling:
    """The settings that were given, and for the rest those of `otherwise`."""
    given = {name: getattr(arguments, name) for name in SAMPLING}
    found = {name: value for name, value in given.items() if value is not None}
    return otherwise._replace(**found)


def _show(arguments, texts: list["Text"]) -> None:
    if arguments.output is None:
        # A model's text may hold any character; a terminal would obey some of them.
        shown = untrusted.page if sys.stdout.isatty() else str
        print("\n".join(shown(text.whole) for text in texts))
    else:
        _write(arguments.output, [{"prompt": t.prompt, "text": t.text} for t in texts])


def _write(output: pathlib.Path, records: list[dict]) -> None:
    files.write_text(output, "".join(strict_json.text(record) + "\n" for record in records))
    print(f"{len(records)} texts in {output}")


class Text(NamedTuple):
    """A prompt, the text after it, and the two as the tokenizer decodes them together."""

    prompt: str
    text: str
    whole: str


class Loaded(NamedTuple):
    """A model with its tokenizer; `store` has the experts that are not in memory."""

    config: model.ModelConfig
    params: dict
    tokenizer: tokenizers.Tokenizer
    folder: pathlib.Path
    store: offload.ExpertStore | None


def _load(arguments) -> Loaded:
    source = stores.find(arguments.checkpoint)
    folder, allow, store = source.folder, arguments.allow_nonfinite, None
    config = configs.model_of(folder)
    tokenizer = stores.tokenizer_for(folder, config, arguments.tokenizer)
    if arguments.offload is None:
        config, params = stores.load(source, mesh.one_device(), allow_nonfinite=allow)
    elif not folders.is_folder(folder):
        raise ValueError(
            f"--offload reads a Hugging Face folder; make one of {folder} with convert"
        )
    elif jax.default_backend() == "cpu":
        config, params, store = offload.load(folder, 1e9 * arguments.offload, allow_nonfinite=allow)
    else:
        config, params = offload.load_into_host_memory(
            folder, 1e9 * arguments.offload, allow_nonfinite=allow
        )
    return Loaded(config, params, tokenizer, folder, store)


def run(arguments) -> list[Text]:
    """The texts in the order of the prompts, with all samples of a prompt together."""
    model_config, params, tokenizer, folder, store = _load(arguments)
    num_tokens = arguments.num_tokens or NUM_TOKENS
    prompts = [tokenizer.prompt(text) for text in arguments.prompt]
    began = time.perf_counter()
    with store.failing_as_it_is() if store else contextlib.nullcontext():
        rounds = [
            generate.generate(
                params,
                model_config,
                prompts,
                num_tokens=num_tokens,
                sampling=_sampling(arguments),
                key=jax.random.key(arguments.seed + sample),
            )
            for sample in range(arguments.samples)
        ]
    if store:
        number = len(prompts) * arguments.samples * num_tokens
        print(_summary(store.counts, number, began), file=sys.stderr)
    texts, ends = [], stores.end_ids(folder, tokenizer)
    by_prompt = zip(*rounds, strict=True)
    for prompt, prompt_ids, samples in zip(arguments.prompt, prompts, by_prompt, strict=True):
        begin = tokenizer.decode(prompt_ids)
        for ids in samples:
            ids = generate.before_end(ids, ends)
            whole = tokenizer.decode(np.concatenate([prompt_ids, ids]))
            # A text decoded alone would lose the space before its first word in some tokenizers.
            joins = whole.startswith(begin)
            text = whole[len(begin) :] if joins else tokenizer.decode(ids)
            texts.append(Text(prompt, text, whole))
    return texts


def _chat(arguments) -> None:
    """Answers the conversations of a file, or what is said on the standard input."""
    beside = stores.tokenizer_folder(stores.find(arguments.checkpoint).folder)
    template = chat_template.load(beside)
    talks = _conversations(arguments, template) if arguments.messages else []
    found = tokenizer_files.Folder(beside).read("generation_config.json")
    settings = _sampling(arguments, chatting.settings(found))
    config, params, tokenizer, folder, store = _load(arguments)
    special = tokenizer.special_tokens
    ends = [special[token] for token in chat.turn_ends(template, tuple(special))]
    number = arguments.num_tokens or min(CHAT_TOKENS, config.max_position_embeddings // 2)
    partner = chatting.Chat(
        *(params, config, tokenizer, template),
        end_ids=(*ends, *stores.end_ids(folder, tokenizer)),
        num_tokens=number,
        sampling=settings,
    )
    with store.failing_as_it_is() if store else contextlib.nullcontext():
        if arguments.messages:
            answers = partner.answers(talks, jax.random.key(arguments.seed))
            records = [
                {
                    "messages": list(talk.messages),
                    **({"tools": list(talk.tools)} if talk.tools else {}),
                    "answer": answer,
                }
                for talk, answer in zip(talks, answers, strict=True)
            ]
            if arguments.output:
                _write(arguments.output, records)
            else:
                print("\n".join(map(strict_json.text, records)))
            return
        seen = untrusted.page if sys.stdout.isatty() else str
        write = functools.partial(print, end="", flush=True)
        chatting.talk(
            partner,
            _lines(),
            lambda part: write(seen(part)),
            system=arguments.system,
            seed=arguments.seed,
        )


def _lines() -> Iterator[str]:
    """The lines that the user types, until the input ends."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # a byte that is not UTF-8 is no end of the talk
    asks = "> " if sys.stdin.isatty() else ""
    with contextlib.suppress(EOFError):
        while True:
            if (line := input(asks)).strip():
                yield line


def _conversations(arguments, template: chat_template.ChatTemplate) -> list[chat.Conversation]:
    """The conversation of each record of a .jsonl file, after the system's message; one that the
    template refuses is named."""
    first = ({"role": "system", "content": arguments.system},) if arguments.system else ()

    def parse(record: dict) -> chat.Conversation:
        talk = chatting.asked(record)
        talk = dataclasses.replace(talk, messages=(*first, *talk.messages))
        template.render(talk.messages, tools=talk.tools, prompt=True)
        return talk

    return json_lines.read(arguments.messages, parse)


def _summary(counts: offload.Counts, num_tokens: int, began: float) -> str:
    seconds, total = time.perf_counter() - began, counts.in_memory + counts.ahead + counts.waited
    return (
        f"{num_tokens} tokens in {seconds:.1f} s ({num_tokens / seconds:.2f} tokens/s, with "
        f"compilation); {counts.bytes_read / 1e9:.2f} GB read; of the experts' matrices, "
        f"{counts.in_memory / total:.0%} were in memory, {counts.ahead / total:.0%} were fetched "
        f"ahead, {counts.waited / total:.0%} were waited for"
    )
