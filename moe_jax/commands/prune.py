"""Prunes a dense model or a mixture: fewer channels, heads, neurons, experts or layers.

Examples:
  python scripts/prune.py --source=runs/quickstart/dense --text=embedded \\
      --model.intermediate_size=128 --output=runs/narrow --to=orbax
  python scripts/prune.py --source=path/to/moe --text=corpus.txt --model.num_experts=4 \\
      --model.moe_intermediate_size=512 --output=path/to/smaller
  python scripts/prune.py --source=path/to/model --text=corpus.txt \\
      --model.hidden_size=1536 --model.num_hidden_layers=20 --output=path/to/smaller

The text decides what is important. Channels, heads and neurons are ranked by their activations
(Minitron, arXiv 2407.14679), layers by the angle between their input and output (ShortGPT, arXiv
2403.03853), experts by the weighted norm of their outputs (REAP, arXiv 2510.13999) or, with
--experts_by=frequency, by the number of tokens routed to them. What remains is the parent's,
unchanged; the loss before and after, on the same text, is printed and kept in the output's
pruning.json. Then train the model, for example with configs/distil_pruned.py. The source, a Hugging
Face folder or a run's workdir, is held in memory.
"""

from moe_jax import command_line, files, stores, strict_json
from moe_jax.analysis import importance
from moe_jax.commands import collect_statistics
from moe_jax.config import model_fields
from moe_jax.hf import configs as hf_configs
from moe_jax.model import transformer
from moe_jax.parallel import mesh
from moe_jax.upcycle import pruning

REPORT = "pruning.json"


def main() -> None:
    parser = command_line.Parser(__doc__)
    given = "a run's workdir, RUN@STEP or a Hugging Face folder"
    parser.add_argument("--source", required=True, metavar="DIR", help=given)
    parser.add_argument(
        "--output",
        required=True,
        type=command_line.folder,
        metavar="DIR",
        help="the folder to write, which must not exist yet",
    )
    parser.add_argument("--to", default="hf", choices=("hf", "orbax"), help="format of the output")
    collect_statistics.add_sample(parser)
    parser.add_argument("--allow_nonfinite", **stores.ALLOW_NONFINITE)
    parser.add_argument(
        "--experts_by",
        default="reap",
        choices=tuple(importance.EXPERT_SCORES),
        metavar="NAME",
        help="the score that experts are ranked by, one of %(choices)s",
    )
    sizes = "a smaller size: NAME is one of " + ", ".join(pruning.SIZES)
    parser.add_argument("--model.NAME", metavar="VALUE", help=sizes)
    arguments, others = parser.parse_known_args()
    with parser.refusing():
        run(arguments, model_fields(others))
    print(f"done: {arguments.output} (peak memory {command_line.peak_memory()})")


def run(arguments, sizes: dict[str, int]) -> dict:
    """Writes the pruned model; returns the report of its loss before it is trained."""
    source, allow = stores.find(arguments.source), arguments.allow_nonfinite
    config, params = stores.load(source, mesh.one_device(), allow_nonfinite=allow)
    smaller = pruning.config_of(config, sizes)
    if arguments.to == "hf":
        hf_configs.write(smaller)  # refuses early a model that no folder can hold
    tokenizer = stores.tokenizer_for(source.folder, config, arguments.tokenizer)
    tokens_NBT = collect_statistics.batches_of(arguments, tokenizer)
    found = importance.measure(params, config, tokens_NBT, arguments.experts_by)
    smaller, made = pruning.pruned(params, config, smaller, found)
    report = {
        "parent": str(source),
        "sizes": sizes,
        "experts_by": arguments.experts_by,
        "layers": pruning.best(found.layers_L, smaller.num_hidden_layers).tolist(),
        "block_influence": found.layers_L.round(6).tolist(),
        "parameters": [transformer.count_parameters(c)[0] for c in (config, smaller)],
        "tokens": sum(tokens_BT.size for tokens_BT in tokens_NBT),
        "loss": [importance.loss(p, c, tokens_NBT) for p, c in ((params, config), (made, smaller))],
    }
    stores.save_as(arguments.to, arguments.output, smaller, made, source=source.folder)
    files.write_text(arguments.output / REPORT, strict_json.text(report, indent=1) + "\n")
    print(
        "step 0: parameters {:,} -> {:,}".format(*report["parameters"]),
        "loss {:.4f} -> {:.4f} nats/token".format(*report["loss"]),
        sep=", ",
    )
    return report
