"""Makes a Mixture-of-Experts model of a trained dense one.

Examples:
  python scripts/upcycle.py --source=path/to/dense --output=path/to/moe --recipe=drop \\
      --num_experts=8 --num_experts_per_tok=2 --recipe.ratio=0.5
  python scripts/upcycle.py --source=runs/quickstart/dense --output=path/to/moe --recipe=naive \\
      --num_experts=8 --num_experts_per_tok=2

The source is a Hugging Face folder (config.json and safetensors; read and written an expert at a
time, so that it need not fit into memory) or a run's workdir. The output is a Hugging Face folder,
with the source's tokenizer; it appears when it is whole.
"""

import pathlib

import jax

from moe_jax import command_line, hf, init, upcycle
from moe_jax.config import ConfigError
from moe_jax.hf import folders, upcycling
from moe_jax.parallel import mesh, naming
from moe_jax.upcycle import recipes, router_init


def main() -> None:
    parser = command_line.Parser(__doc__)
    parser.add_argument("--source", required=True, type=pathlib.Path, help="the dense model")
    parser.add_argument("--output", required=True, type=pathlib.Path, help="must not exist")
    parser.add_argument("--recipe", default="drop", choices=recipes.RECIPES)
    parser.add_argument("--num_experts", type=int, default=8)
    parser.add_argument("--num_experts_per_tok", type=int, default=2)
    parser.add_argument("--router", default="normal", choices=router_init.ROUTER_INITIALISERS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--recipe.NAME", dest="parameter", metavar="VALUE", help="a parameter of the recipe"
    )
    arguments, others = parser.parse_known_args()
    try:
        run(arguments, recipes.parse(arguments.recipe, others))
    except (ValueError, ConfigError, OSError) as error:
        parser.error(" ".join(str(error).split()))
    print(f"done: {arguments.output}")


def run(arguments, parameters: dict) -> None:
    key = naming.fold_in(jax.random.key(arguments.seed), "upcycle")
    sizes = {
        "num_experts": arguments.num_experts,
        "num_experts_per_tok": arguments.num_experts_per_tok,
    }
    how = {"recipe": arguments.recipe, "router": arguments.router, "key": key, **parameters}
    if folders.is_folder(arguments.source):
        source = folders.Folder(arguments.source)
        moe_config = source.config.to_moe(**sizes)
        upcycling.upcycle_folder(source, arguments.output, moe_config, progress=True, **how)
        return
    config, params = init.load(arguments.source, mesh.one_device())
    moe_config = config.to_moe(**sizes)
    made = jax.jit(lambda p: upcycle.upcycle(p, config, moe_config, **how))(params)
    hf.save(arguments.output, moe_config, made)


if __name__ == "__main__":
    main()
