"""Measuring in batches: the rows, and how many devices share them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_unlearn.app import processes
from jax_unlearn.app.tasks.base import in_batches


@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize("count", [5, 16, 37])
def test_every_row_comes_once_with_the_key_of_its_batch(monkeypatch, spread, count):
    if spread:
        monkeypatch.setattr(processes, "_NOTHING_WON", ())
    key, rows = jax.random.key(3), np.arange(count, dtype=np.float32)
    weight = jnp.float32(2.0)  # As parameters are: on one device.
    devices = set()

    @jax.jit
    def measured(key, x, tree):
        return {"twice": weight * x + tree["one"], "noise": jax.random.normal(key) + 0 * x}

    def function(key, x, tree):
        devices.add(len(getattr(x, "devices", set)()))
        return measured(key, x, tree)

    found = in_batches(function, key, rows, {"one": np.ones(count), "none": None}, size=16)
    np.testing.assert_allclose(found["twice"], 2 * rows + 1)
    # Of equal batches: 5, 16, and 13 three times; where devices share them, of whole eights.
    size = {5: 8, 16: 16, 37: 16}[count] if spread else {5: 5, 16: 16, 37: 13}[count]
    noise = [jax.random.normal(jax.random.fold_in(key, n)) for n in range(3)]
    np.testing.assert_allclose(found["noise"], np.repeat(noise, size)[:count], rtol=1e-6)
    assert devices == ({8} if spread else {0})
