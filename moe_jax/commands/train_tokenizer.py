"""Trains a SentencePiece BPE tokenizer on the training split of a text.

Examples:
  python scripts/train_tokenizer.py --output=embedded.model
  python scripts/train_tokenizer.py --source=path/to/folder --vocab_size=8192 --output=mine.model

Held-out documents (for a path, the default share of config.data.validation_fraction) are not
trained on; they give the reported bytes per token. Every text can be decoded exactly.

Exit status: 0 done, 2 a mistake on the command line or in the text.
"""

import pathlib
import shlex
from collections.abc import Iterator

import tqdm

from moe_jax import command_line, config
from moe_jax.data import sources, tokenizers
from moe_jax.data.cache import DATASETS, cache_folder
from moe_jax.data.document import TRAIN, VALIDATION


def main() -> None:
    parser = command_line.Parser(__doc__)
    text = 'a path or a glob, "tfds:NAME" or "embedded"'
    parser.add_argument("--source", default="embedded", help=text)
    parser.add_argument("--vocab_size", default=4096, type=int, help="number of pieces")
    parser.add_argument(
        "--output",
        required=True,
        type=command_line.folder,
        metavar="FILE.model",
        help="the file to write",
    )
    arguments = parser.parse_args()
    with parser.refusing():
        bytes_per_token = train(arguments.source, arguments.vocab_size, arguments.output)
    print(
        f"{arguments.output}: {arguments.vocab_size} pieces, {bytes_per_token:.2f} bytes/token of "
        f"held-out text; use --config.data.tokenizer={shlex.quote(str(arguments.output))} "
        f"--config.model.vocab_size={arguments.vocab_size}"
    )


def train(source: str, vocab_size: int, output: pathlib.Path) -> float:
    """Writes the tokenizer's model; returns the bytes per predicted token on held-out text, or nan
    if there is no such text.

    Raises: ValueError, OSError.
    """
    if not output.parent.is_dir():
        raise ValueError(f"--output={output}: no folder {output.parent}; make it first")
    if output.is_dir():
        raise ValueError(f"--output={output} is a folder; give a file, for example FILE.model")
    sources.check(source)
    # Reading this first reports a mistake in the text before the long training.
    held_out = list(_texts(source, VALIDATION))
    tokenizers.train_bpe(_texts(source, TRAIN), vocab_size, output)
    tokenizer = tokenizers.load(str(output))
    # The end token of each text is predicted too.
    num_tokens = sum(len(tokenizer.encode(text)) + 1 for text in held_out)
    num_bytes = sum(len(text.encode()) for text in held_out)
    return num_bytes / num_tokens if num_tokens else float("nan")


def _texts(source: str, split: str) -> Iterator[str]:
    documents = sources.documents(
        source,
        split,
        validation_fraction=config.default().data.validation_fraction,
        data_dir=cache_folder("") / DATASETS,
    )
    bar = {"desc": f"reading {split}", "unit": " documents", "disable": None, "delay": 5}
    for document in tqdm.tqdm(documents, **bar):
        yield document.text
