"""Makes a Mixture-of-Experts model of a trained dense one, or of several, or of another mixture.

Examples:
  python scripts/upcycle.py --source=path/to/dense --output=path/to/moe --recipe=drop \\
      --num_experts=8 --num_experts_per_tok=2 --recipe.ratio=0.5
  python scripts/upcycle.py --source=path/to/base,path/to/math --output=path/to/moe \\
      --recipe=branch_train_mix --num_experts=2 --num_experts_per_tok=1
  python scripts/upcycle.py --source=path/to/dense --output=runs/fine --to=orbax \\
      --recipe=virtual_group --granularity=4 --num_experts=16 --num_experts_per_tok=4
  python scripts/upcycle.py --source=path/to/moe --output=path/to/dense --recipe=merge_back

A source is a Hugging Face folder (config.json and safetensors; read and written an expert at a
time, so that it need not fit into memory) or a run's workdir. The output is a Hugging Face folder,
with the source's tokenizer, or with --to=orbax a run's workdir; it appears when it is whole.
--model.NAME=VALUE sets what else the new model's config has of its own, such as
--model.norm_topk_prob=false. The recipes, their parameters (--recipe.NAME=VALUE) and what each
keeps are a table in README.md.
"""

import pathlib

import jax

from moe_jax import command_line, stores, tree
from moe_jax.analysis import parent_statistics, similarity
from moe_jax.config import model_fields
from moe_jax.hf import folders
from moe_jax.model import layout
from moe_jax.parallel import mesh
from moe_jax.upcycle import plan as plans
from moe_jax.upcycle import recipes, router_init, transform

# Fields that --model cannot set, and what to do instead.
OF_KIND = {"model_type": "the family is one that can hold the model; leave it out"}
DECIDED = {
    recipes.MIXTURE: OF_KIND
    | {name: f"use --{name}" for name in ("num_experts", "num_experts_per_tok")},
    recipes.DENSE: OF_KIND
    | {
        name: "the recipe makes a dense model as wide as an expert; leave it out"
        for name in "intermediate_size moe_intermediate_size num_experts num_expert_groups "
        "layers".split()
    },
}


def main() -> None:
    parser = command_line.Parser(__doc__)
    parser.add_argument(
        "--source", required=True, metavar="DIR[,DIR…]", help="the parent or parents"
    )
    parser.add_argument("--output", required=True, type=pathlib.Path, help="must not exist")
    parser.add_argument("--to", default="hf", choices=("hf", "orbax"))
    parser.add_argument("--recipe", default="drop", choices=recipes.RECIPES)
    parser.add_argument("--num_experts", type=int, default=8)
    parser.add_argument("--num_experts_per_tok", type=int, default=2)
    parser.add_argument("--granularity", type=int, default=1, help="experts to one feed-forward")
    initialisers = (*router_init.ROUTER_INITIALISERS, router_init.COPIED)
    parser.add_argument(
        "--router", default="", choices=initialisers, help="the recipe's by default"
    )
    parser.add_argument("--statistics", help="a file of scripts/collect_statistics.py")
    parser.add_argument("--seed", type=command_line.seed, default=0)
    parser.add_argument("--recipe.NAME", metavar="VALUE", help="a parameter of the recipe")
    parser.add_argument("--model.NAME", metavar="VALUE", help="a field of the new model's config")
    arguments, others = parser.parse_known_args()
    of_model = [argument for argument in others if argument.startswith("--model.")]
    of_recipe = [argument for argument in others if argument not in of_model]
    with parser.refusing():
        parameters = recipe_parameters(arguments.recipe, of_recipe)
        rows = run(arguments, model_fields(of_model), parameters)
    print(f"done: {arguments.output} (peak memory {command_line.peak_memory()})")
    if rows:
        print(similarity.legend(rows), similarity.table(rows), sep="\n")


def run(arguments, fields: dict, parameters: dict) -> list[similarity.Experts]:
    """Returns how similar the new experts are in some of the layers."""
    key = tree.fold_in(jax.random.key(arguments.seed), "upcycle")
    paths, statistics = sources_of(arguments), arguments.statistics
    source_config = stores.config_of(paths[0])
    plan = plans.make(
        source_config,
        config_of(source_config, arguments, fields),
        recipe=arguments.recipe,
        router=arguments.router,
        num_parents=len(paths),
        statistics=parent_statistics.load(statistics) if statistics else None,
        parameters=parameters,
    )
    print(f"step 0: {plan.at_start}", flush=True)
    if arguments.to == "hf" and all(folders.is_folder(path) for path in paths):
        parents = [folders.Folder(path) for path in paths]
        stores.upcycle_folders(plan, parents, arguments.output, key, progress=True)
        return of_folder(folders.Folder(arguments.output), parents)
    _, parents = stores.load_alike(paths, mesh.one_device())
    made = jax.jit(lambda parents: transform.execute(plan, parents, key))(parents)
    stores.save_as(arguments.to, arguments.output, plan.config, made, source=paths[0])
    if plan.config.num_experts < 2:
        return []
    dense = len(parents) == 1 and not source_config.num_experts
    return similarity.experts(made, plan.config, *((parents[0], source_config) if dense else ()))


def recipe_parameters(recipe: str, arguments: list[str]) -> dict:
    """The parameters in command-line arguments "--recipe.NAME=VALUE", by their defaults' types.

    Raises: ValueError for one that the recipe does not take, or not with that value.
    """
    texts = command_line.options("recipe", arguments)
    recipes.check(recipe, dict.fromkeys(texts))
    defaults = recipes.RECIPES[recipe].defaults
    parameters = {
        name: command_line.typed(f"recipe.{name}", text, type(defaults[name]))
        for name, text in texts.items()
    }
    recipes.check(recipe, parameters)
    return parameters


def sources_of(arguments) -> list[pathlib.Path]:
    """Raises: ValueError for none, or an output inside one."""
    parts = [part.strip() for part in arguments.source.split(",")]
    paths = [pathlib.Path(part) for part in parts if part]
    if not paths:
        raise ValueError(f"--source={arguments.source} names no parent; give its folder")
    for path in paths:
        if arguments.output.resolve().is_relative_to(path.resolve()):
            raise ValueError(
                f"--output={arguments.output} lies in the source {path}; choose one outside"
            )
    return paths


def of_folder(made: folders.Folder, sources: list[folders.Folder]) -> list[similarity.Experts]:
    """Rows for the first, middle and last sparse layer; one layer is in memory at a time."""
    layers = layout.sparse_layers(made.config)
    if made.config.num_experts < 2:
        return []
    dense = len(sources) == 1 and not sources[0].config.num_experts
    return [
        similarity.of_layer(
            layer,
            made.feed_forward(layer, "moe/experts"),
            sources[0].feed_forward(layer, "mlp") if dense else None,
        )
        for layer in sorted({layers[0], layers[len(layers) // 2], layers[-1]})
    ]


def config_of(source, arguments, fields: dict):
    """The config of the model that the command makes of parents of the config `source`.

    Raises: ValueError for what no model can have, or what is set by another option.
    """
    gives = recipes.RECIPES[arguments.recipe].gives
    if decided := [name for name in fields if name in DECIDED[gives]]:
        raise ValueError(f"--model.{decided[0]}: {DECIDED[gives][decided[0]]}")
    if arguments.granularity < 1:
        raise ValueError(f"--granularity={arguments.granularity} must be at least 1")
    if gives == recipes.DENSE:
        return source.to_dense(**fields)
    if arguments.granularity > 1:
        fields = {
            "moe_intermediate_size": source.intermediate_size // arguments.granularity,
            **fields,
        }
    if recipes.RECIPES[arguments.recipe].shared:
        fields = {"shared_expert_intermediate_size": source.intermediate_size, **fields}
    return source.to_moe(
        num_experts=arguments.num_experts,
        num_experts_per_tok=arguments.num_experts_per_tok,
        **{"layers": source.layers if source.num_experts else None, **fields},
    )
