"""The price of forgetting a class of the embedded model, before any training.

Samples of the model are judged once by its own diffusion classifier: h(x) is how likely x is to be
trousers. For each bound ε on E_p[h] the dual gives λ*(ε), its derivative dλ*/dε, and the price
P*(ε) = min KL(p‖q) in nats, with a bootstrap band over the samples. By the envelope theorem
dP*/dε = −λ*, printed beside the finite difference of P*.
"""

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import jax_unlearn
from jax_unlearn import duality, likelihoods, samplers
from jax_unlearn.app import embedded

TROUSERS = 1
SHARES = (0.75, 0.5, 0.25)  # of what the model itself shows


def judged(parts, rows=32, steps=10, draws=4):
    """h of parts · rows samples of the model without a label, [n]."""
    apply, params, schedule, _ = jax_unlearn.load_pretrained(embedded.model_path())

    @jax.jit
    def part(key):
        noise_key, draws_key = jax.random.split(key)
        noise = jax.random.normal(noise_key, (rows, 28, 28, 1))
        found = samplers.sample(
            lambda x_t, t: apply(params, x_t, t, None), schedule, key, noise, steps=steps
        )
        posterior = likelihoods.diffusion_classifier(
            apply, params, schedule, draws_key, x_0=found.x_0, concepts=jnp.arange(10),
            draws=draws, weights=likelihoods.noised_weights(schedule, 0.5),
        )  # fmt: skip
        return jnp.exp(posterior.value[:, TROUSERS])

    keys = jax.random.split(jax.random.key(0), parts)
    return np.concatenate([part(key) for key in tqdm(keys, "samples judged", disable=None)])


def prices(h, shares=SHARES, width=0.02):
    """A row for each share: what the duals of the samples say of the bound share · mean h."""
    solve, rows = duality.likelihood_solver(h[:, None]), []
    derivative = jax.jacfwd(lambda epsilon: solve(epsilon).multipliers)
    for epsilon in jnp.asarray(shares)[:, None] * h.mean():
        found = duality.likelihood_multipliers(h[:, None], epsilon, key=jax.random.key(1))
        beside = [solve(epsilon * scale).primal_value for scale in (1 - width, 1 + width)]
        rows.append(
            {
                "epsilon": epsilon[0],
                "multiplier": found.multipliers[0],
                "derivative": derivative(epsilon)[0, 0],
                "price": found.solution.primal_value,
                "low": found.price_interval[0],
                "high": found.price_interval[1],
                "slope": (beside[1] - beside[0]) / (2 * width * epsilon[0]),
            }
        )
    return [{name: float(value) for name, value in row.items()} for row in rows]


def main(parts=4):
    h = judged(parts)
    print(f"{len(h)} samples, of which {h.mean():.3f} show trousers")
    print("      ε      λ*   dλ*/dε  P*, nats (95 %)          dP*/dε by differences")
    table = prices(h)
    for row in table:
        print(
            "{epsilon:7.4f} {multiplier:7.3f} {derivative:8.2f}  "
            "{price:.4f} ({low:.4f} to {high:.4f})  {slope:.3f}".format(**row)
        )
    return {"h": h, "table": table}


if __name__ == "__main__":
    main()
