"""A row of the table of routers: all that the rest of the code must know of one."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import jax

from moe_jax.model.routing import Groups, Routing

if TYPE_CHECKING:
    from moe_jax.model.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The arrays that a router may look at beside its logits."""

    x_MD: jax.Array
    groups: Groups
    leaves: Mapping[str, jax.Array]  # the layer's, by the names in the router's row
    key: jax.Array | None = None  # None in evaluation


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array of a router's parameters.

    zero: it begins as zeros, else by the model's `initializer`.
    upcycled: the initialiser (`upcycle/router_init.py`) that upcycling makes it by; "" is zeros. A
      kernel is made by the recipe's.
    """

    shape: Callable[[int, int], tuple[int, ...]]  # of hidden_size and num_experts
    zero: bool = True
    upcycled: str = ""


KERNEL = Leaf(lambda D, E: (D, E), zero=False)


@dataclasses.dataclass(frozen=True)
class Router:
    """A row of the table of routers.

    route: (logits_ME, inputs, **values) -> Routing; the values are the fields of ModelConfig that
      are named in `reads`, and the router's own `parameters`.
    parameters: names and defaults of what `ModelConfig.router_parameters` may set for it.
    problems: lines that refuse a ModelConfig with this router.
    sum_is_fixed: whether a token's weights have the same sum whatever the logits.
    even_weight: the sum of a token's weights where the logits of all experts are equal; None takes
      1 where the sum is fixed, else num_experts_per_tok / num_experts.
    copies_share: copies of an expert share its probability among them (as in a softmax), or know
      nothing of each other (False); None where neither holds.
    one_per_group: a token goes to at most one expert of each of `num_expert_groups`.
    causal: a token's experts do not depend on other tokens.
    products: the number of products of [M, D] and [D, E] that it makes.
    inner_products: the number of products of [M, E] and [E, E].
    copied: its leaves have a part for each expert, which can be copied with the expert.
    learned: False for a router that ignores its logits, to time the best case.
    same_as: fields of a model that computes the same in evaluation, by another router.
    decodes_as: the router that takes its place where tokens are generated one by one.
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
        """The keyword arguments of `route` for a model."""
        own = {**self.parameters, **dict(config.router_parameters)}
        return {**{name: getattr(config, name) for name in self.reads}, **own}

    def weight_at_even_logits(self, config: "ModelConfig") -> float:
        if self.even_weight is not None:
            return self.even_weight(config)
        fixed = self.sum_is_fixed(config)
        return 1.0 if fixed else config.num_experts_per_tok / config.num_experts
