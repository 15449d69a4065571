"""Each example is run, and what it prints held to what it claims."""

import ast
import importlib.util
import json
import pathlib
import re
import runpy
import subprocess
import sys

import jax
import numpy as np
import pytest
import scipy.optimize

from jax_unlearn import losses

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"
NUMBER = r"([-+]?\d+\.\d+(?:e[-+]\d+)?)"


def example(name):
    """The module, by a name that no other module has."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def numbers(text):
    return [[float(found) for found in re.findall(NUMBER, line)] for line in text.splitlines()]


def test_without_diffusion_finds_the_known_solutions(capsys):
    module = example("without_diffusion")
    found = module.main()
    np.testing.assert_allclose(found["point"], [0.5, 0.5], atol=1e-5)
    np.testing.assert_allclose(found["multiplier"], [-1.0], atol=1e-5)

    def error(line, rows):
        return np.square(line[0] * module.X[rows] + line[1] - module.Y[rows]).mean()

    def solve(bounds):
        """The same problem by sequential quadratic programming."""

        def slack(line):
            return bounds - [error(line, module.GROUP == group) for group in (1, 2)]

        return scipy.optimize.minimize(
            lambda line: error(line, slice(None)),
            np.zeros(2),
            method="SLSQP",
            constraints={"type": "ineq", "fun": slack},
            options={"ftol": 1e-14},
        )

    np.testing.assert_allclose(found["line"], solve(module.BOUNDS).x, atol=1e-4)
    # A multiplier is the price of its bound: −d(mean error)/d(bound), by differences.
    for price, unit in zip(found["prices"], np.eye(2), strict=True):
        dearer, cheaper = (solve(module.BOUNDS + step * unit).fun for step in (-1e-3, 1e-3))
        np.testing.assert_allclose(price, (dearer - cheaper) / 2e-3, rtol=1e-3, atol=1e-5)
    assert found["prices"][0] > 0.1
    assert found["prices"][1] == 0
    assert numbers(capsys.readouterr().out)[0] == [0.5, 0.5, -1.0]


@pytest.mark.slow
def test_unrolled_derivatives_are_those_of_the_written_out_recursion(capsys):
    module = example("unrolled")
    found, limit = module.main()

    def objective(b, rate, steps):
        x, multiplier = module.A, 0.0
        for _ in range(steps):
            multiplier = max(multiplier + 0.1 * (b - module.C @ x), 0.0)
            x = x - rate * (x - module.A - multiplier * module.C)
        return x, 0.5 * np.square(x - module.A).sum()

    b, rate, width = module.B, module.RATE, 1e-6
    for steps, rows in found.items():
        along_b = [objective(b + sign * width, rate, steps) for sign in (-1, 1)]
        along_rate = [objective(b, rate + sign * width, steps) for sign in (-1, 1)]
        expected = {
            "dx/db": (along_b[1][0] - along_b[0][0]) / (2 * width),
            "dP/db": (along_b[1][1] - along_b[0][1]) / (2 * width),
            "dP/drate": (along_rate[1][1] - along_rate[0][1]) / (2 * width),
        }
        for name, (derivative, finite) in rows.items():
            np.testing.assert_allclose(derivative, expected[name], rtol=1e-5, atol=1e-8)
            np.testing.assert_allclose(finite, expected[name], rtol=1e-5, atol=1e-8)
    for name, (derivative, _) in found[200].items():
        np.testing.assert_allclose(derivative, limit[name], atol=1e-4)
    assert "limit: dx/db [0.2 0.4], dP/db 0.4, dP/drate 0.0" in capsys.readouterr().out


@pytest.mark.slow
def test_eight_devices_give_the_numbers_of_one():
    """In a process of its own: it chooses its devices before jax is imported."""
    command = "import json, devices; print(json.dumps(devices.main()))"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", command],
        cwd=EXAMPLES, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    *printed, last = done.stdout.splitlines()
    found = json.loads(last)
    assert found["left"] < 0.2
    # The exact solution's multiplier is below the share of what is forgotten, 1/3.
    assert 0.05 < found["multiplier"] < 1 / 3
    for name in ("pmap", "mesh"):
        assert found[name] < 1e-5
        assert any(line.startswith(f"{name} on 8 devices") for line in printed)


@pytest.mark.slow
def test_the_front_rises_and_its_derivative_is_that_of_differences():
    found = example("front").main()
    thresholds, values, multipliers, objectives = np.transpose(found["rows"])
    np.testing.assert_allclose(values, thresholds, atol=0.02)
    assert (np.diff(multipliers) > 0).all()
    assert (np.diff(objectives) > 0).all()
    # The exact solution's multipliers are below the share of what is forgotten.
    assert multipliers[-1] < 0.5
    np.testing.assert_allclose(found["slope"], found["finite"], rtol=1e-2)


@pytest.mark.slow
def test_an_equinox_network_forgets_zeros():
    found = example("equinox_denoiser").main(pretraining=1000, steps=300)
    before, after = found["before"], found["after"]
    assert after["zeros"] == pytest.approx(1.5 * before["zeros"], rel=0.25)
    assert after["others"] == pytest.approx(before["others"], rel=0.03)
    assert 0.02 < found["multiplier"] < 0.1


@pytest.mark.slow
def test_an_nnx_network_forgets_the_left_gaussian():
    module = example("nnx_denoiser")
    found = module.main()
    before, after = found["left"]
    assert before < 0.5
    assert after == pytest.approx(module.THRESHOLD, rel=0.05)
    assert found["right"][1] < found["right"][0]
    assert 0.2 < found["multiplier"] < 0.5


@pytest.mark.slow
def test_prices_are_those_of_the_dual_of_the_samples(capsys):
    """The weighted mean of h is ε at λ*, and dλ*/dε is −1 over its weighted variance."""
    found = example("price_of_forgetting").main(parts=2)
    h = found["h"].astype(np.float64)
    assert h.shape == (64,)
    assert ((h >= 0) & (h <= 1)).all()
    assert [row["epsilon"] for row in found["table"]] == pytest.approx(
        [share * h.mean() for share in (0.75, 0.5, 0.25)]
    )
    for row in found["table"]:
        weights = np.exp(-row["multiplier"] * h)
        price = -np.log(weights.mean()) - row["multiplier"] * row["epsilon"]
        weights /= weights.sum()
        variance = weights @ np.square(h) - (weights @ h) ** 2
        assert weights @ h == pytest.approx(row["epsilon"], rel=1e-3)
        assert row["derivative"] == pytest.approx(-1 / variance, rel=1e-2)
        assert row["price"] == pytest.approx(price, rel=1e-2, abs=1e-5)
        assert row["slope"] == pytest.approx(-row["multiplier"], rel=2e-2)
        assert row["low"] <= row["price"] <= row["high"]
    header, _, *rows = capsys.readouterr().out.splitlines()
    assert header.startswith("64 samples")
    assert len(rows) == 3


@pytest.mark.slow
def test_fifteen_lines_close_a_constraint(capsys):
    path = EXAMPLES / "fifteen_lines.py"
    source = path.read_text()
    docstring = ast.parse(source).body[0]
    lines = source.splitlines()[docstring.end_lineno :]
    assert len([line for line in lines if line.strip()]) <= 15
    runpy.run_path(str(path))
    violations, multipliers = np.transpose(numbers(capsys.readouterr().out))
    assert violations[0] == pytest.approx(0.016, abs=1e-4)
    assert abs(violations[-10:].mean()) < 0.006
    # Found between nothing and twice the share of trousers, one image in ten.
    assert 0.05 < multipliers[-20:].mean() < 0.2


@pytest.mark.slow
def test_a_loop_of_ones_own_closes_a_constraint(capsys):
    module = example("own_loop")
    found = module.main(steps=40)
    violations, multipliers = found["violations"], found["multipliers"]
    assert violations[0] == pytest.approx(0.016, abs=1e-4)
    assert abs(violations[-20:].mean()) < 0.008
    assert 0.03 < multipliers[-20:].mean() < 0.2
    printed = numbers(capsys.readouterr().out)
    means = np.stack([violations, multipliers], axis=1).reshape(4, 10, 2).mean(axis=1)
    np.testing.assert_allclose(printed, means, atol=1e-3)

    # The value before, which both examples on the embedded model are told.
    pixels, labels = module.embedded.load_data().train
    x_0 = module.data.to_unit_range(pixels[labels == module.TROUSERS][:300])
    drawn = losses.draw(jax.random.key(0), x_0, module.weighting.probabilities)
    before = jax.jit(losses.denoising_loss, static_argnums=0, static_argnames="clip")(
        module.apply, module.reference, module.schedule,
        x_0=x_0, cond=None, draws=drawn, weighting=module.weighting, clip=True,
    )  # fmt: skip
    assert abs(before.mean() - 0.044) < 3 * before.std() / np.sqrt(len(before))


def test_the_readme_shows_the_fifteen_lines():
    code = (EXAMPLES / "fifteen_lines.py").read_text().split('"""\n\n', 1)[1]
    readme = (EXAMPLES.parent / "README.md").read_text()
    assert f"```python\n{code}```" in readme
