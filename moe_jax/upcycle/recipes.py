"""The published ways to make one expert out of a layer's dense FFN, as compositions of transforms.

A recipe is a function (ffn, key, **parameters) -> ffn; its keyword arguments are the parameters
that `config.init.upcycle` and `upcycle.upcycle` accept for it.
"""

import inspect

import jax

from moe_jax.upcycle import experts


def naive(ffn: experts.FFN, key: jax.Array) -> experts.FFN:
    """Exact copies (Komatsuzaki et al., Sparse Upcycling, arXiv 2212.05055)."""
    del key
    return ffn


def drop(
    ffn: experts.FFN,
    key: jax.Array,
    *,
    ratio: float = 0.5,
    index_sharing: str = "neuron",
    permute_neurons: bool = False,
) -> experts.FFN:
    """Copies with a share `ratio` of the neurons redrawn (Drop-Upcycling, arXiv 2502.19261).

    The released code differs from the paper: it has index_sharing="per_matrix" and
    permute_neurons=True.
    """
    if permute_neurons:
        ffn = experts.permute_neurons(ffn, key)
    return experts.redraw_neurons(ffn, key, ratio=ratio, index_sharing=index_sharing)


RECIPES = {"naive": naive, "drop": drop}

CHOICES = {"index_sharing": ("neuron", "per_matrix")}


def check(recipe: str, parameters: dict) -> None:
    """Raises: ValueError for an unknown recipe, or a parameter or value it does not take."""
    if recipe not in RECIPES:
        raise ValueError(f"recipe={recipe!r} is unknown; use one of {', '.join(RECIPES)}")
    accepted = parameters_of(recipe)
    for name, value in parameters.items():
        if name not in accepted:
            takes = ", ".join(accepted) or "no parameters"
            raise ValueError(f"recipe {recipe!r} has no parameter {name!r}; it takes {takes}")
        if value is None:
            continue
        if name == "ratio" and not 0 <= value <= 1:
            raise ValueError(f"ratio={value} is not a share of neurons; use a value from 0 to 1")
        if value not in CHOICES.get(name, (value,)):
            raise ValueError(f"{name}={value!r} is unknown; use one of {', '.join(CHOICES[name])}")


def parse(recipe: str, arguments: list[str]) -> dict:
    """The parameters in command-line arguments "--recipe.NAME=VALUE", by their defaults' types.

    Raises: ValueError for one that the recipe does not take, or not with that value.
    """
    signature = inspect.signature(RECIPES[recipe]).parameters
    parameters = {}
    for argument in arguments:
        name, equals, text = argument.removeprefix("--recipe.").partition("=")
        if not argument.startswith("--recipe.") or not equals:
            raise ValueError(f"unexpected argument {argument!r}; use --recipe.NAME=VALUE")
        check(recipe, {name: None})
        kind = type(signature[name].default)
        words = {"true": True, "false": False}
        if kind is bool and text.lower() not in words:
            raise ValueError(f"--recipe.{name}={text}: use true or false")
        try:
            parameters[name] = words[text.lower()] if kind is bool else kind(text)
        except ValueError:
            raise ValueError(f"--recipe.{name}={text} is not a {kind.__name__}") from None
    check(recipe, parameters)
    return parameters


def parameters_of(recipe: str) -> tuple[str, ...]:
    """The names of the parameters that a recipe takes."""
    arguments = inspect.signature(RECIPES[recipe]).parameters.values()
    return tuple(a.name for a in arguments if a.kind is a.KEYWORD_ONLY)
