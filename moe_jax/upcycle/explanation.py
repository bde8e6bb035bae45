"""The recipes explained: a table of all, or one recipe with its parameters."""

import inspect

from moe_jax.upcycle import recipes


def table() -> str:
    """The recipes as a Markdown table."""
    rows = [
        (f"`{name}`", r.takes, r.kept, r.changed, r.start.text, _parameters(r), r.cost, r.source)
        for name, r in recipes.RECIPES.items()
    ]
    first = ("recipe", "made from", "kept", "changed")
    head = (*first, "step 0, against the parent", "parameters", "cost", "source")
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _parameters(recipe: recipes.Recipe) -> str:
    return ", ".join(f"`{name}={value}`" for name, value in recipe.defaults.items()) or "none"


def _statistics(recipe: recipes.Recipe) -> str:
    """The parent's statistics that a recipe needs, or uses if they are given."""
    needed = [f"{name} (needed)" for name in recipe.statistics]
    of_values = [
        f"{statistic} (for {name}={value})"
        for name, limits in recipe.limits.items()
        for value, statistic in limits.statistics.items()
    ]
    optional = [f"{name} (if given)" for name in recipe.optional]
    return ", ".join([*needed, *of_values, *optional]) or "none"


def explained(name: str) -> str:
    """One recipe explained in a few lines, for a terminal."""
    recipe = recipes.RECIPES[name]
    described = inspect.getdoc(recipe.make) or ""
    lines = [
        f"{name}: {' '.join(described.split())}",
        f"  made from {'several dense models' if recipe.several else f'a {recipe.takes} model'}",
        f"  kept      {recipe.kept}",
        f"  changed   {recipe.changed}",
        f"  step 0    {recipe.start.text}",
        f"  cost      {recipe.cost}",
        f"  router    {recipe.router or 'none'}",
        f"  source    {recipe.source}",
        f"  --statistics: {_statistics(recipe)}",
        "  parameters, --recipe.NAME=VALUE or config.init.upcycle.NAME:",
    ]
    rows = [
        f"    {parameter}={default}  {str(recipe.limits[parameter]) or 'True or False'}"
        for parameter, default in recipe.defaults.items()
    ]
    return "\n".join([*lines, *(rows or ["    none"])])
