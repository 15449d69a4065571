"""SalUn: which entries of the parameters train, and an optimizer of these alone."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jax_unlearn.typing import Params

__all__ = ["MaskedState", "masked", "saliency_mask"]


def saliency_mask(gradient: Params, share: float = 0.5) -> Params:
    """SalUn's weights to train: the `share` of all entries with the largest |gradient|.

    Args:
      gradient: of the loss of the images to forget, over all of them, at the pretrained model;
        for instance `jax.grad` of `neg_grad` on batches of `forget` alone, summed.
      share: in (0, 1]; of n entries ⌊share n⌋ are chosen, ties in the order of the leaves.

    Returns:
      A tree of booleans for `masked`.

    Raises:
      ValueError: for a share outside (0, 1].

    Example: the two largest of four.
      >>> import jax.numpy as jnp
      >>> from jax_unlearn import baselines
      >>> mask = baselines.saliency_mask({"a": jnp.array([3.0, -0.1]), "b": jnp.array([0.2, -7.0])})
      >>> mask["a"].tolist(), mask["b"].tolist()
      ([True, False], [False, True])
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must lie in (0, 1], not be {share}.")
    leaves, tree = jax.tree.flatten(gradient)
    magnitudes = jnp.concatenate([jnp.abs(leaf).ravel() for leaf in leaves])
    chosen = jnp.argsort(magnitudes, descending=True, stable=True)[: int(share * magnitudes.size)]
    flat = jnp.zeros(magnitudes.shape, bool).at[chosen].set(True)
    ends = [0]
    for leaf in leaves:
        ends.append(ends[-1] + leaf.size)
    parts = zip(leaves, ends[:-1], ends[1:], strict=True)
    return tree.unflatten(flat[start:end].reshape(leaf.shape) for leaf, start, end in parts)


class MaskedState(NamedTuple):
    """The mask, and the state of the optimizer behind it."""

    mask: Params
    inner: Any


def masked(optimizer: optax.GradientTransformation, mask: Params) -> optax.GradientTransformation:
    """The optimizer on some entries of each array; the others do not move at all.

    The mask acts on gradients, so that moments and norms know of none other, and once more on
    updates, so that weight decay does not move the rest. (`optax.masked` is for whole arrays.)

    Args:
      optimizer: any.
      mask: booleans, the tree and shapes of the parameters; it is carried in the state.

    Example: a gradient of ones moves the first of two alone.
      >>> import jax.numpy as jnp, optax
      >>> from jax_unlearn import baselines
      >>> optimizer = baselines.masked(optax.sgd(0.5), jnp.array([True, False]))
      >>> updates, state = optimizer.update(jnp.ones(2), optimizer.init(jnp.zeros(2)))
      >>> updates.tolist()
      [-0.5, 0.0]
    """

    def select(mask: Params, updates: Params) -> Params:
        return jax.tree.map(lambda chosen, leaf: jnp.where(chosen, leaf, 0), mask, updates)

    def init(params: Params) -> MaskedState:
        return MaskedState(jax.tree.map(jnp.asarray, mask), optimizer.init(params))

    def update(
        updates: Params, state: MaskedState, params: Params = None
    ) -> tuple[Params, MaskedState]:
        updates, inner = optimizer.update(select(state.mask, updates), state.inner, params)
        return select(state.mask, updates), state._replace(inner=inner)

    return optax.GradientTransformation(init, update)  # pyrefly: ignore
