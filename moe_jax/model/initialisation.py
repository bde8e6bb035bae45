"""The table of distributions from which a new model's random weights are drawn."""

import dataclasses
from collections.abc import Callable

import jax

# The leaves whose products are added to the residual stream.
OUTPUTS = ("wo", "down")


@dataclasses.dataclass(frozen=True)
class Initializer:
    """One distribution of weights.

    draw: (key, shape) -> samples in units of the deviation, `ModelConfig.initializer_range`.
    scaled_outputs: in a model of L layers the standard deviation of `OUTPUTS` is divided by
      sqrt(2 L), so that the residual stream does not grow with depth.
    """

    draw: Callable[[jax.Array, tuple[int, ...]], jax.Array] = jax.random.normal
    scaled_outputs: bool = False

    def deviation(self, name: str, initializer_range: float, num_layers: int) -> float:
        """The standard deviation of the leaf with this name."""
        scaled = self.scaled_outputs and name in OUTPUTS
        return initializer_range / (2 * num_layers) ** 0.5 if scaled else initializer_range


def _cut(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Normal samples truncated at 3 standard deviations."""
    return jax.random.truncated_normal(key, -3, 3, shape)


# The keys are the values of `ModelConfig.initializer`.
INITIALIZERS = {
    "normal": Initializer(),
    # Megatron-LM (Shoeybi et al., arXiv 1909.08053), and GPT-2 before it.
    "scaled_outputs": Initializer(scaled_outputs=True),
    # OLMoE (Muennighoff et al., arXiv 2409.02060): a deviation of 0.02 before truncation.
    "truncated_normal": Initializer(_cut),
}
