"""The parts of an implementation of the grouped matmul that is not plain XLA."""

import dataclasses
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class Kernel:
    """Three functions on a tuple of weights that are multiplied by the same rows.

    product(x_MD, weights, group_sizes_E) -> one [M, F] for each [E, D, F] of `weights`, which may
      all be rows of stacks (`ops/stacks.py`)
    input_gradient(gradients, weights, group_sizes_E) -> [M, D], summed over the pairs
    weight_gradient(x_MD, gradients, group_sizes_E) -> one [E, D, F] for each gradient [M, F], in
      float32

    Rows beyond the sum of the groups give zeros and contribute nothing, even if they hold NaN.
    """

    product: Callable
    input_gradient: Callable
    weight_gradient: Callable
