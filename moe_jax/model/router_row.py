"""A row of the table of routers: everything that the rest of the code must know about a router."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import jax

from moe_jax.model.routing import Groups, Routing

if TYPE_CHECKING:
    from moe_jax.model.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The arrays that a router may read besides its logits."""

    x_MD: jax.Array
    groups: Groups
    leaves: Mapping[str, jax.Array]  # the layer's parameters, by their names in the router's row
    key: jax.Array | None = None  # None in evaluation


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array of a router's parameters.

    zero: it starts as zeros; otherwise the model's `initializer` draws it.
    upcycled: the initialiser (`upcycle/router_init.py`) that upcycling uses for it; "" is zeros.
      For a kernel the recipe chooses the initialiser.
    """

    shape: Callable[[int, int], tuple[int, ...]]  # (hidden_size, num_experts) -> shape
    zero: bool = True
    upcycled: str = ""


KERNEL = Leaf(lambda D, E: (D, E), zero=False)


@dataclasses.dataclass(frozen=True)
class Router:
    """A row of the table of routers.

    route: (logits_ME, inputs, **values) -> Routing; the values are the fields of ModelConfig that
      are named in `reads`, and the router's own `parameters`.
    parameters: the parameters that `ModelConfig.router_parameters` may set, and their defaults.
    problems: lines that refuse a ModelConfig with this router.
    sum_is_fixed: True if a token's weights have the same sum whatever the logits.
    even_weight: the sum of a token's weights when all its logits are equal; None stands for 1 if
      the sum is fixed, else for num_experts_per_tok / num_experts.
    copies_share: True if copies of an expert share its probability (as in a softmax), False if
      copies do not affect each other's scores, None if neither holds.
    one_per_group: a token goes to at most one expert of each of `num_expert_groups`.
    causal: a token's experts do not depend on other tokens.
    products: the number of matrix products [M, D] · [D, E] that it computes.
    inner_products: the number of matrix products [M, E] · [E, E].
    copied: its leaves have a part for each expert, which can be copied with the expert.
    learned: False for a router that ignores its logits, which is used to time the best case.
    same_as: fields for a model with another router that computes the same function in evaluation.
    decodes_as: the router that replaces it when tokens are generated one by one.
    """

    route: Callable[..., Routing]
    reads: tuple[str, ...] = ("num_experts_per_tok",)
    parameters: Mapping[str, float | int | str | bool] = dataclasses.field(default_factory=dict)
    leaves: Mapping[str, Leaf] = dataclasses.field(default_factory=lambda: {"kernel": KERNEL})
    problems: Callable[["ModelConfig"], Iterator[str]] = lambda config: iter(())
    sum_is_fixed: Callable[["ModelConfig"], bool] = lambda config: True
    even_weight: Callable[["ModelConfig"], float] | None = None
    copies_share: Callable[["ModelConfig"], bool] | None = None
    one_per_group: bool = False
    causal: bool = True
    products: int = 1
    inner_products: int = 0
    copied: bool = True
    learned: bool = True
    same_as: Mapping[str, str | bool] = dataclasses.field(default_factory=dict)
    decodes_as: str = ""

    def values(self, config: "ModelConfig") -> dict:
        """The keyword arguments that `route` takes from a model's config."""
        own = {**self.parameters, **dict(config.router_parameters)}
        return {**{name: getattr(config, name) for name in self.reads}, **own}

    def weight_at_even_logits(self, config: "ModelConfig") -> float:
        if self.even_weight is not None:
            return self.even_weight(config)
        fixed = self.sum_is_fixed(config)
        return 1.0 if fixed else config.num_experts_per_tok / config.num_experts
