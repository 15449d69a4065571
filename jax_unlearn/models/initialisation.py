"""Random parameters for networks that are trained from scratch."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_unlearn.typing import Array, Params

__all__ = ["random_params"]


def random_params(shapes: Params, key: Array) -> Params:
    """Randomly initialised float32 parameters.

    Kernels are normal with variance 1 / (values that enter one output), tables of embeddings
    standard normal, Fourier frequencies normal of standard deviation 16, the rest neutral.

    Args:
      shapes: a pytree of `jax.ShapeDtypeStruct`, as from a network's `param_shapes`.
      key: a PRNG key.

    Returns:
      What goes under 'params' in the network's `apply`.
    """
    # One draw for all: a jitted `init` takes minutes to compile, one draw a leaf many seconds.
    ends = np.cumsum([leaf.size for leaf in jax.tree.leaves(shapes)])
    noise = iter(np.split(np.asarray(jax.random.normal(key, (ends[-1],))), ends[:-1]))

    def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> Array:
        values = next(noise).reshape(leaf.shape)
        name = path[-1].key
        if name == "kernel":
            values = values / np.sqrt(np.prod(leaf.shape[:-1]))
        elif name == "weight":
            values = 16 * values
        elif name != "embedding":
            values = np.full(leaf.shape, float(name == "scale"))
        return jnp.asarray(values, jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)
