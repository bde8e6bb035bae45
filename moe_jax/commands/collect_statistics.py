"""Measures, on a text, the statistics of the parent that some upcycling recipes need.

Examples:
  python scripts/collect_statistics.py --source=runs/quickstart/dense --text=corpus.txt \\
      --num_experts=8 --neurons=gradient --output=dense.npz
  python scripts/collect_statistics.py --source=path/to/moe --text=corpus.txt --output=moe.npz
  python scripts/upcycle.py --source=path/to/moe --recipe=prune --num_experts=4 \\
      --statistics=moe.npz --output=path/to/pruned

To prune a dense model to its most important neurons, use --num_experts=1 --neurons=gradient
--num_neurons=N here, then scripts/upcycle.py with --recipe=llama_moe --recipe.partition=statistics
--num_experts=1 --num_experts_per_tok=1 --model.moe_intermediate_size=N, then --recipe=merge_back.

For a dense model it measures the `centroids` of each layer's inputs (for --router=centroids) and
the `neurons` of each of --num_experts experts (for --recipe=llama_moe
--recipe.partition=statistics). For an MoE it measures the `load`, `similarity` and `utility` of its
experts (for prune, diversify_merge, expert_upcycling). The whole source, a Hugging Face folder or a
run's workdir, is held in memory.
"""

from typing import Any

import numpy as np

from moe_jax import command_line, files, stores
from moe_jax.analysis import parent_statistics
from moe_jax.data import sources
from moe_jax.data.cache import DATASETS, cache_folder
from moe_jax.data.document import TRAIN
from moe_jax.parallel import mesh


def main() -> None:
    parser = command_line.Parser(__doc__)
    given = "a run's workdir, RUN@STEP or a Hugging Face folder"
    parser.add_argument("--source", required=True, metavar="DIR", help=given)
    add_sample(parser)
    parser.add_argument(
        "--output",
        required=True,
        type=command_line.folder,
        metavar="FILE.npz",
        help="the file to write",
    )
    parser.add_argument(
        "--num_experts", type=int, default=8, help="number of experts to make from a dense model"
    )
    kinds, why = (
        ("weights", "activations", "gradient"),
        "the statistic that assigns neurons to experts",
    )
    parser.add_argument("--neurons", default=kinds[0], choices=kinds, help=why)
    parser.add_argument(
        "--num_neurons", type=int, help="neurons per expert, for --neurons=gradient"
    )
    parser.add_argument("--allow_nonfinite", **stores.ALLOW_NONFINITE)
    arguments = parser.parse_args()
    with parser.refusing():
        run(arguments)
    print(f"done: {arguments.output}")


def add_sample(parser: command_line.Parser) -> None:
    """Adds the options of a text of which a sample is read, for `batches_of`."""
    parser.add_argument("--text", required=True, help="the text, given as for config.data.source")
    parser.add_argument("--tokenizer", help="a tokenizer to use instead of the model's own")
    parser.add_argument("--num_batches", type=int, default=8, help="number of batches to read")
    parser.add_argument("--batch_size", type=int, default=8, help="sequences per batch")
    parser.add_argument("--sequence_length", type=int, default=256, help="tokens per sequence")


def run(arguments) -> None:
    if arguments.num_experts < 1:
        raise ValueError(f"--num_experts={arguments.num_experts} must be at least 1")
    source, allow = stores.find(arguments.source), arguments.allow_nonfinite
    config, params = stores.load(source, mesh.one_device(), allow_nonfinite=allow)
    tokenizer = stores.tokenizer_for(source.folder, config, arguments.tokenizer)
    tokens_NBT = batches_of(arguments, tokenizer)
    if config.num_experts:
        found = parent_statistics.of_mixture(params, config, tokens_NBT)
    else:
        found = parent_statistics.of_dense(
            params,
            config,
            tokens_NBT,
            num_experts=arguments.num_experts,
            neurons=arguments.neurons,
            num_neurons=arguments.num_neurons,
        )
    with files.whole_file(arguments.output) as unfinished, open(unfinished, "wb") as file:
        np.savez(file, **dict[str, Any](found))


def batches_of(arguments, tokenizer) -> list[np.ndarray]:
    """Batches of tokens, each [B, T], from the beginning of the text."""
    shape = (arguments.num_batches, arguments.batch_size, arguments.sequence_length)
    for name in ("num_batches", "batch_size", "sequence_length"):
        if (number := getattr(arguments, name)) < 1:
            raise ValueError(f"--{name}={number} must be at least 1")
    wanted, parts, number = int(np.prod(shape)), [], 0
    cache = cache_folder("") / DATASETS
    sources.check(arguments.text)
    how: dict[str, Any] = {"validation_fraction": 0, "data_dir": cache}
    texts = sources.texts("--text", arguments.text, TRAIN, **how)
    for document in texts:
        parts.append(np.asarray(tokenizer.encode(document.text), np.int32))
        number += len(parts[-1])
        if number >= wanted:
            return list(np.concatenate(parts)[:wanted].reshape(shape))
    raise ValueError(
        f"{arguments.text} has {number} tokens, not the {wanted} of {shape[0]} batches; "
        "give more text or lower --num_batches"
    )
