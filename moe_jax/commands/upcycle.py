"""Makes a Mixture-of-Experts model from one or several trained dense models, or another MoE.

Examples:
  python scripts/upcycle.py --source=path/to/dense --output=path/to/moe --recipe=drop \\
      --num_experts=8 --num_experts_per_tok=2 --recipe.ratio=0.5
  python scripts/upcycle.py --source=path/to/base,path/to/math --output=path/to/moe \\
      --recipe=branch_train_mix --num_experts=4 --num_experts_per_tok=2
  python scripts/upcycle.py --source=path/to/dense --output=runs/fine --to=orbax \\
      --recipe=virtual_group --granularity=4 --num_experts=16 --num_experts_per_tok=4
  python scripts/upcycle.py --source=path/to/moe --output=path/to/dense --recipe=merge_back

A source is a Hugging Face folder (config.json and safetensors; read and written one expert at a
time, so it need not fit into memory), a run's workdir, or RUN@STEP for a run's checkpoint of a
step. The output is a Hugging Face folder with
the source's tokenizer or, with --to=orbax, a run's workdir; it appears when it is complete.
--model.NAME=VALUE sets another field of the new model's config, such as
--model.norm_topk_prob=false. python scripts/recipes.py NAME explains a recipe,
its parameters (--recipe.NAME=VALUE) and the parts that it keeps.
"""

import sys

import jax

from moe_jax import cards, command_line, stores, tree
from moe_jax import config as configs
from moe_jax.analysis import parent_statistics, similarity
from moe_jax.config import model_fields
from moe_jax.hf import configs as hf_configs
from moe_jax.hf import folders
from moe_jax.model import layout
from moe_jax.model.config import ModelConfig, fields_of
from moe_jax.model.fields import EXPERTS, ROUTER, without_effect
from moe_jax.parallel import mesh
from moe_jax.upcycle import plan as plans
from moe_jax.upcycle import recipes, router_init, step_zero, transform

# Kind of the new model -> the fields that --model cannot set, each with advice.
DECIDED = {
    recipes.MIXTURE: {name: f"use --{name}" for name in ("num_experts", "num_experts_per_tok")},
    recipes.DENSE: dict.fromkeys(
        fields_of(EXPERTS, ROUTER) | {"intermediate_size"},
        "the recipe makes a dense model as wide as an expert; leave it out",
    ),
}
for reasons in DECIDED.values():
    reasons["model_type"] = "the family is one that can hold the model; leave it out"


def main() -> None:
    parser = command_line.Parser(__doc__)
    add = parser.add_argument
    add("--source", required=True, metavar="DIR[,DIR…]", help="the parent or parents")
    add(
        "--output",
        required=True,
        type=command_line.folder,
        metavar="DIR",
        help="the folder to write, which must not exist yet",
    )
    add("--to", default="hf", choices=("hf", "orbax"), help="format of the output")
    add(
        "--recipe",
        default="drop",
        choices=recipes.RECIPES,
        metavar="NAME",
        help="one of %(choices)s",
    )
    add("--num_experts", type=int, default=8, help="experts per sparse layer")
    add("--num_experts_per_tok", type=int, default=2, help="experts per token")
    add(
        "--granularity",
        type=int,
        default=1,
        help="number of experts that a feed-forward of the parent is split into",
    )
    initialisers = (*router_init.ROUTER_INITIALISERS, router_init.COPIED)
    router = "initialiser of the routers, one of %(choices)s (default: the recipe's)"
    add("--router", default="", choices=initialisers, metavar="NAME", help=router)
    add("--statistics", metavar="FILE.npz", help="a file written by the command collect_statistics")
    add("--seed", type=command_line.seed, default=0, help="seed for all random values")
    add("--allow_nonfinite", **stores.ALLOW_NONFINITE)
    add("--recipe.NAME", metavar="VALUE", help="a parameter of the recipe")
    add("--model.NAME", metavar="VALUE", help="a field of the new model's config")
    arguments, others = parser.parse_known_args()
    of_model = [argument for argument in others if argument.startswith("--model.")]
    of_recipe = [argument for argument in others if argument not in of_model]
    names = {
        **{name: "model" for name in ModelConfig.__dataclass_fields__},
        **{name: "recipe" for name in recipes.RECIPES[arguments.recipe].limits},
    }
    for argument in of_recipe:
        name = argument.removeprefix("--").partition("=")[0]
        if name in names:
            parser.error(f"--{name} is no option; did you mean --{names[name]}.{name}?")
    with parser.refusing():
        parameters = recipe_parameters(arguments.recipe, of_recipe)
        rows = run(arguments, model_fields(of_model), parameters)
    print(f"done: {arguments.output} (peak memory {command_line.peak_memory()})")
    if rows:
        print(similarity.legend(rows), similarity.table(rows), sep="\n")


def run(arguments, fields: dict, parameters: dict) -> list[similarity.Experts]:
    """Writes the new model; returns the similarity of its experts in some of its layers."""
    key = tree.fold_in(jax.random.key(arguments.seed), "upcycle")
    sources, statistics = sources_of(arguments), arguments.statistics
    paths, allow = [source.folder for source in sources], arguments.allow_nonfinite
    source_config = configs.model_of(paths[0])
    plan = plans.make(
        source_config,
        config_of(source_config, arguments, fields),
        recipe=arguments.recipe,
        router=arguments.router,
        num_parents=len(paths),
        statistics=parent_statistics.load(statistics) if statistics else None,
        parameters=parameters,
    )
    if arguments.to == "hf":
        hf_configs.write(plan.config)  # refuses early a model that no folder can hold
    print(f"step 0: {step_zero.in_words(plan)}", flush=True)
    if plan.config.weight_is_constant:
        print(
            "num_experts_per_tok=1: weights that sum to one give the router no gradient in "
            "training; --model.norm_topk_prob=false has Switch's",
            flush=True,
        )
    command = [*command_line.command("upcycle"), *sys.argv[1:]]
    page = cards.of_upcycling(plan, sources, arguments.seed, command)
    if arguments.to == "hf" and all(folders.is_folder(path) for path in paths):
        parents = [folders.Folder(path, allow_nonfinite=allow) for path in paths]
        stores.upcycle_folders(plan, parents, arguments.output, key, progress=True)
        cards.write(arguments.output, page)
        return of_folder(folders.Folder(arguments.output, allow_nonfinite=allow), parents)
    _, parents_params = stores.load_alike(sources, mesh.one_device(), allow_nonfinite=allow)
    params = jax.jit(lambda parents: transform.execute(plan, parents, key))(parents_params)
    stores.save_as(arguments.to, arguments.output, plan.config, params, source=paths[0])
    cards.write(arguments.output, page)
    if plan.config.num_experts < 2:
        return []
    dense = len(paths) == 1 and not source_config.num_experts
    parent = (parents_params[0], source_config) if dense else None
    return similarity.experts(params, plan.config, parent)


def recipe_parameters(recipe: str, arguments: list[str]) -> dict:
    """The parameters from command-line arguments "--recipe.NAME=VALUE", typed like their defaults.

    Raises: ValueError for a parameter or value that the recipe does not accept.
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


def sources_of(arguments) -> list[configs.Source]:
    """The parents; raises ValueError if there are none, or the output is inside one."""
    sources = [stores.find(part.strip()) for part in arguments.source.split(",") if part.strip()]
    if not sources:
        raise ValueError(f"--source={arguments.source} names no parent; give its folder")
    for path in (source.folder for source in sources):
        if arguments.output.resolve().is_relative_to(path.resolve()):
            raise ValueError(
                f"--output={arguments.output} lies in the source {path}; choose one outside"
            )
    return sources


def of_folder(moe: folders.Folder, parents: list[folders.Folder]) -> list[similarity.Experts]:
    """Rows for the first, middle and last sparse layer; one layer is in memory at a time."""
    if moe.config.num_experts < 2:
        return []
    layers = layout.sparse_layers(moe.config)
    dense = len(parents) == 1 and not parents[0].config.num_experts
    return [
        similarity.of_layer(
            layer,
            moe.feed_forward(layer, "moe/experts"),
            parents[0].feed_forward(layer, "mlp") if dense else None,
        )
        for layer in sorted({layers[0], layers[len(layers) // 2], layers[-1]})
    ]


def config_of(source, arguments, fields: dict):
    """The config of the model that the command makes from parents with the config `source`.

    Raises: ValueError for a field or value that no model can have, a field that another option
      sets, or a field that nothing reads.
    """
    config = _config_of(source, arguments, fields)
    for line in without_effect(config, fields, "--model."):
        raise ValueError(line)
    return config


def _config_of(source, arguments, fields: dict):
    gives = recipes.RECIPES[arguments.recipe].gives
    if decided := [name for name in fields if name in DECIDED[gives]]:
        raise ValueError(f"--model.{decided[0]}: {DECIDED[gives][decided[0]]}")
    if arguments.granularity < 1:
        raise ValueError(f"--granularity={arguments.granularity} must be at least 1")
    if gives == recipes.DENSE:
        return source.to_dense(**fields)
    if arguments.granularity > 1:
        width = source.intermediate_size // arguments.granularity
        fields = {"moe_intermediate_size": width, **fields}
    if recipes.RECIPES[arguments.recipe].shared:
        fields = {"shared_expert_intermediate_size": source.intermediate_size, **fields}
    return source.to_moe(
        num_experts=arguments.num_experts,
        num_experts_per_tok=arguments.num_experts_per_tok,
        **{"layers": source.layers if source.num_experts else None, **fields},
    )
