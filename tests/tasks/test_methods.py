"""The baselines of --method: batches, losses and gradients against torch, and what is refused."""

import dataclasses
import pathlib
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_unlearn import formulations, losses, schedules
from jax_unlearn.app import cli, data, methods
from jax_unlearn.app.options import ConceptOptions, DataOptions
from jax_unlearn.app.tasks import concept_methods, concept_request, image_methods, image_task
from jax_unlearn.app.tasks import images as requests
from jax_unlearn.app.tasks.conditions import Numbered
from jax_unlearn.pretrained import load_pretrained

SMALL = {"batch_size": 16, "forget_batch_size": 8, "sampling_steps": 4, "seed": 3}
KEY = jax.random.key(5)
TABLE = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
RNG = np.random.default_rng(1)
PARAMS = {
    "gain": np.float32(0.6),
    "tone": RNG.normal(size=(8, 8, 1)).astype(np.float32) / 4,
    "mix": RNG.normal(size=3).astype(np.float32),
}
REFERENCE = jax.tree.map(lambda leaf: np.float32(leaf * 0.8 - 0.1), PARAMS)


def denoiser(params, x_t, t, cond):
    """A network small enough to be written twice."""
    shift = (cond @ params["mix"]) * (1 + t / 50)
    return params["gain"] * x_t + params["tone"] * jnp.sin(x_t) + shift[:, None, None, None]


def with_toy(request):
    pretrained = request.pretrained._replace(apply=Numbered(denoiser, TABLE), params=REFERENCE)
    return request._replace(pretrained=pretrained)


def images_of(model, files, **more):
    options = DataOptions(
        model=str(model), forget=(str(files["forget"]),), retain=(str(files["retain"]),),
        **SMALL | more,
    )  # fmt: skip
    return with_toy(requests.from_paths(load_pretrained(model), options)), options


def concept_of(model, **more):
    given = {"model": str(model), "forget": ("dog",), "stored_samples": 24, **SMALL}
    options = ConceptOptions(**given | more)
    return with_toy(concept_request.make_request(load_pretrained(model), options)), options


class Torch:
    """The same network, its schedule and the losses, in torch."""

    def __init__(self, schedule):
        self.torch = pytest.importorskip("torch")
        self.params = {name: self.tensor(leaf).requires_grad_() for name, leaf in PARAMS.items()}
        self.reference = {name: self.tensor(leaf) for name, leaf in REFERENCE.items()}
        alphas_cumprod = self.torch.sigmoid(self.tensor(schedule.log_snr))
        self.alpha, self.sigma = alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()
        self.clip = schedule.clip_range
        self.times = [int(t) for t in schedules.timesteps(schedule, SMALL["sampling_steps"])]

    def tensor(self, array):
        return self.torch.tensor(np.asarray(array), dtype=self.torch.float64)

    def whole(self, array):
        return self.torch.tensor(np.asarray(array), dtype=self.torch.long)

    def predict(self, params, x_t, t, cond):
        """cond: numbers, or vectors."""
        cond = np.asarray(cond)
        cond = self.tensor(TABLE[cond] if cond.ndim == 1 else cond)
        shift = (cond @ params["mix"]) * (1 + t / 50)
        return (
            params["gain"] * x_t + params["tone"] * self.torch.sin(x_t) + shift[:, None, None, None]
        )

    def noised(self, x_0, t, noise):
        at = t.reshape(-1, 1, 1, 1)
        return self.alpha[at] * x_0 + self.sigma[at] * noise

    def error(self, x, y):
        return ((x - y) ** 2).sum(dim=(1, 2, 3))

    def denoising(self, key, rows, noise_of=lambda noise: noise, per=64):
        """Mean over rows of a squared error a dimension; time steps are drawn uniformly."""
        drawn = losses.draw(key, jnp.asarray(rows.x_0), jnp.full(50, 1 / 50))
        t, noise = self.whole(drawn.t), noise_of(self.tensor(drawn.noise))
        x_t = self.noised(self.tensor(rows.x_0), t, noise)
        return self.error(self.predict(self.params, x_t, t, rows.cond), noise).mean() / per

    def gradient(self, loss):
        """One vector of all parameters."""
        found = self.torch.autograd.grad(
            loss, list(self.params.values()), retain_graph=True, allow_unused=True
        )
        return self.torch.cat(
            [
                (self.torch.zeros_like(leaf) if part is None else part).reshape(-1)
                for part, leaf in zip(found, self.params.values(), strict=True)
            ]
        )

    def states(self, key, cond):
        """States of the guided sampler of the model itself, at a drawn number of steps."""
        count_key, noise_key = jax.random.split(key)
        keys = jax.vmap(lambda j: jax.random.fold_in(noise_key, j))(jnp.arange(len(cond)))
        x = self.tensor(jax.vmap(lambda key: jax.random.normal(key, (8, 8, 1)))(keys))
        count = int(jax.random.randint(count_key, (), 0, SMALL["sampling_steps"]))
        null = np.full(len(cond), 3) if np.ndim(cond) == 1 else np.tile(TABLE[3], (len(cond), 1))
        with self.torch.no_grad():
            for t, s in zip(self.times[:count], self.times[1 : count + 1], strict=True):
                at = self.whole(np.full(len(cond), t))
                free = self.predict(self.params, x, at, null)
                guided = free + 2.5 * (self.predict(self.params, x, at, cond) - free)
                x_0 = (x - self.sigma[t] * guided) / self.alpha[t]
                x_0 = x_0.clamp(-self.clip, self.clip)
                guided = (x - self.alpha[t] * x_0) / self.sigma[t]
                x = self.alpha[s] * x_0 + self.sigma[s] * guided
        return x, self.whole(np.full(len(cond), self.times[count]))

    def esd(self, states, cond, target, strength):
        x_t, t = states
        null = np.full(len(target), 3) if np.ndim(target) == 1 else np.tile(TABLE[3], (8, 1))
        free, concept = (self.predict(self.reference, x_t, t, c) for c in (null, target))
        wanted = free - strength * (concept - free)
        return self.error(self.predict(self.params, x_t, t, cond), wanted).mean()


def check(trained, batch, value, gradient, reference=REFERENCE):
    """The command's loss on a batch against a value and a gradient of torch."""
    loss = jax.jit(jax.value_and_grad(trained.loss))
    got, slope = loss(PARAMS, reference, KEY, batch)
    assert float(got) == pytest.approx(value.item(), rel=1e-4)
    ours = np.concatenate([np.ravel(slope[name]) for name in PARAMS])
    wanted = gradient.detach().numpy()
    np.testing.assert_allclose(ours, wanted, rtol=1e-3, atol=1e-5 * np.abs(wanted).max())
    assert np.abs(wanted).max() > 1e-3


def image_methods_of(method, model, files, **more):
    """What trains, a batch of it as the loss takes it, and the request."""
    request, options = images_of(model, files, method=method, **more)
    options.validate()
    weighting = losses.time_weighting(losses.simple_weights(50, 64))
    of = (request.pretrained.apply, request.pretrained.schedule, weighting)
    setting = image_methods._Setting(request, options, of, image_task._prepare)
    trained = image_methods._METHODS[method](setting)
    prepare = trained.prepare or image_task._prepare
    trained = trained._replace(loss=trained.loss(methods.strength_of(options)))
    return trained, prepare(trained.batch(options, 4)), request, options


@pytest.mark.slow
@pytest.mark.parametrize("method", ["naive-deletion", "neg-grad"])
def test_deletion_and_ascent(tiny_model, tiny_images, method):
    ascends = method == "neg-grad"
    more = {"strength": 0.7} if ascends else {}
    trained, batch, request, _ = image_methods_of(method, tiny_model, tiny_images, **more)
    side = Torch(request.pretrained.schedule)
    kept_key, forget_key = jax.random.split(KEY) if ascends else (KEY, None)
    value = side.denoising(kept_key, batch.kept)
    if ascends:
        value = value - 0.7 * side.denoising(forget_key, batch.forget)
    check(trained, batch, value, side.gradient(value))


@pytest.mark.slow
@pytest.mark.parametrize("strength", [0.05, 40.0])
def test_siss_without_importance_sampling(tiny_model, tiny_images, strength):
    """The second gradient is of norm 40, and is shortened to 1."""
    trained, batch, request, _ = image_methods_of(
        "siss-no-is", tiny_model, tiny_images, strength=strength
    )
    side = Torch(request.pretrained.schedule)
    kept_key, forget_key = jax.random.split(KEY)
    kept, forgotten = side.denoising(kept_key, batch.kept), side.denoising(forget_key, batch.forget)
    g_a = side.gradient(forgotten)
    gradient = side.gradient(kept) - strength * g_a / g_a.norm()
    assert (gradient.norm() > 1) == (strength > 1)
    gradient = gradient / max(1.0, float(gradient.norm()))
    check(trained, batch, kept - strength / g_a.norm() * forgotten, gradient)


def test_siss_pairs_retained_images_with_those_to_forget(tiny_model, tiny_images):
    trained, batch, request, _ = image_methods_of("siss", tiny_model, tiny_images, strength=0.05)
    side = Torch(request.pretrained.schedule)
    assert batch.kept.x_0.shape == batch.forget.x_0.shape == (8, 8, 8, 1)
    drawn = losses.draw(KEY, batch.kept.x_0, jnp.full(50, 1 / 50))
    t, noise = side.whole(drawn.t), side.tensor(drawn.noise)
    x, a = side.tensor(batch.kept.x_0), side.tensor(batch.forget.x_0)
    from_a = side.tensor(drawn.uniform < 0.5)[:, None, None, None]
    x_t = side.noised(from_a * a + (1 - from_a) * x, t, noise)
    at = t.reshape(-1, 1, 1, 1)
    d_x, d_a = (
        ((x_t - side.alpha[at] * one) ** 2).sum(dim=(1, 2, 3)) / (2 * side.sigma[t] ** 2)
        for one in (x, a)
    )
    w_x, w_a = 1 / (0.5 + 0.5 * (d_x - d_a).exp()), 1 / (0.5 * (d_a - d_x).exp() + 0.5)
    epsilon = side.predict(side.params, x_t, t, batch.forget.cond)
    noise_x, noise_a = ((x_t - side.alpha[at] * one) / side.sigma[at] for one in (x, a))
    kept = (w_x * side.error(epsilon, noise_x)).mean() / 64
    forgotten = (w_a * side.error(epsilon, noise_a)).mean() / 64
    g_x, g_a = side.gradient(kept), side.gradient(forgotten)
    gradient = g_x - 0.05 * g_a / g_a.norm()
    gradient = gradient / max(1.0, float(gradient.norm()))
    check(trained, batch, kept - 0.05 / g_a.norm() * forgotten, gradient)


@pytest.mark.slow
def test_erase_diff(tiny_model, tiny_images):
    trained, batch, request, _ = image_methods_of(
        "erase-diff", tiny_model, tiny_images, strength=2.0
    )
    side = Torch(request.pretrained.schedule)
    kept_key, forget_key = jax.random.split(KEY)
    kept = side.denoising(kept_key, batch.kept)
    uniform = side.torch.distributions.Normal(0.0, 1.0).cdf
    forgotten = side.denoising(forget_key, batch.forget, noise_of=uniform)
    g_r, g_f = side.gradient(kept), side.gradient(forgotten)
    weight = max(0.0, 2.0 - float(g_r @ g_f / (g_f @ g_f)))
    assert weight > 0
    check(trained, batch, kept + weight * forgotten, g_r + weight * g_f)


@pytest.mark.slow
def test_salun_denoises_what_is_forgotten_as_under_another_label(tiny_model, tiny_images):
    trained, batch, request, options = image_methods_of(
        "saliency", tiny_model, tiny_images, strength=0.4
    )
    side = Torch(request.pretrained.schedule)
    chosen, _ = requests.forgotten_rows(request, options, 4)
    np.testing.assert_array_equal(batch.moved.x_0, data.to_x_0(chosen.pixels))
    assert set(batch.moved.cond.tolist()) == {1}
    assert set(batch.moved.anchor.tolist()) == {0, 2}
    first, second = jax.random.split(KEY)
    drawn = losses.draw(first, batch.moved.x_0, jnp.full(50, 1 / 50))
    t = side.whole(drawn.t)
    x_t = side.noised(side.tensor(batch.moved.x_0), t, side.tensor(drawn.noise))
    ours, other = (
        side.predict(side.params, x_t, t, cond) for cond in (batch.moved.cond, batch.moved.anchor)
    )
    moved = side.error(ours, other.detach()).mean() / 64
    value = moved + 0.4 * side.denoising(second, batch.rows.kept)
    check(trained, batch, value, side.gradient(value))
    # Half of 68 entries: where the mean of many draws of the loss is steepest.
    assert sum(int(leaf.sum()) for leaf in jax.tree.leaves(trained.mask)) == 34
    assert trained.mask["gain"]
    assert trained.mask["mix"].all()


@pytest.mark.slow
def test_selective_amnesia_shows_noise_under_what_is_forgotten(tiny_model, tiny_images):
    trained, batch, request, _ = image_methods_of(
        "selective-amnesia", tiny_model, tiny_images, strength=3.0
    )
    side = Torch(request.pretrained.schedule)
    assert set(batch.base.cond.tolist()) == {1}
    noise = np.asarray(batch.base.x_0)
    assert noise.mean() == pytest.approx(0, abs=4 * 0.58 / np.sqrt(noise.size))
    assert noise.std() == pytest.approx(1 / np.sqrt(3), rel=0.1)  # uniform on [−1, 1]
    base_key, kept_key = jax.random.split(KEY)
    value = sum(
        side.denoising(key, rows, per=1)
        for key, rows in ((base_key, batch.base), (kept_key, batch.kept))
    )
    params, fisher = trained.reference
    for name, leaf in side.params.items():
        np.testing.assert_array_equal(params[name], REFERENCE[name])
        moved = (leaf - side.reference[name]) ** 2
        value = value + 1.5 * (side.tensor(fisher[name]) * moved).sum()
    check(trained, batch, value, side.gradient(value), reference=trained.reference)
    assert min(float(leaf.min()) for leaf in jax.tree.leaves(fisher)) > 0


def test_retained_images_of_baselines_are_under_their_own_labels(tiny_model, tiny_images):
    """And under none: never, as those of the constrained run, under what is forgotten."""
    _, batch, request, options = image_methods_of("neg-grad", tiny_model, tiny_images)
    assert set(requests.batch(request, options, 4).base.cond.tolist()) == {1, 3}
    assert batch.base is None
    assert batch.kept.x_0.shape[0] == 16
    stored = data.to_x_0(request.retain.pixels)
    for x_0, cond in zip(np.asarray(batch.kept.x_0), batch.kept.cond.tolist(), strict=True):
        (place,) = np.flatnonzero((stored == x_0).all(axis=(1, 2, 3)))
        assert cond in (request.retain.labels[place], 3)
    assert batch.kept.cond.tolist().count(3) == 8
    assert set(batch.forget.cond.tolist()) == {1, 3}


def concept_method_of(method, model, **more):
    request, options = concept_of(model, method=method, **more)
    options.validate()
    trained = concept_methods._METHODS[method](concept_methods._Setting(request, options))
    trained = trained._replace(loss=trained.loss(methods.strength_of(options)))
    return trained, trained.batch(options, 4), Torch(request.pretrained.schedule)


@pytest.mark.parametrize("seed", [5, 8])
def test_esd(tiny_model, seed, monkeypatch):
    monkeypatch.setitem(globals(), "KEY", jax.random.key(seed))
    trained, batch, side = concept_method_of("esd", tiny_model, strength=2.0)
    assert set(batch.cond.tolist()) == set(batch.target.tolist()) == {1}
    assert set(batch.base.tolist()) == {3}
    value = side.esd(side.states(KEY, batch.cond), batch.cond, batch.target, 2.0)
    check(trained, batch, value, side.gradient(value))


@pytest.mark.slow
def test_adv_unlearn_is_esd_at_what_an_attack_finds(tiny_model):
    trained, batch, side = concept_method_of("adv-unlearn", tiny_model, strength=0.4)
    assert set(batch.kept.cond.tolist()) == {0, 2, 3}
    attack, forget_key, kept_key = jax.random.split(KEY, 3)
    radius = 0.5 * np.linalg.norm(TABLE[1] - TABLE[3])
    schedule = load_pretrained(tiny_model).schedule
    schedule = dataclasses.replace(schedule, variance_type="fixed_geometric")
    adversary = formulations.worst_conditions(
        denoiser, schedule, radius=radius, steps=30, shape=(8, 8, 1), points=10, table=TABLE
    )
    worst = np.asarray(jax.jit(adversary)(PARAMS, REFERENCE, attack, batch).forget.cond)
    moved = np.linalg.norm(worst - TABLE[1], axis=1)
    assert (moved <= radius * 1.001).all()
    assert moved.max() > 0.2 * radius
    states = side.states(forget_key, TABLE[batch.forget.cond])
    value = side.esd(states, worst, TABLE[batch.forget.cond], 1.0)
    x_t, t = side.states(kept_key, TABLE[batch.kept.cond])
    ours, theirs = (
        side.predict(of, x_t, t, batch.kept.cond) for of in (side.params, side.reference)
    )
    value = value + 0.4 * side.error(ours, theirs).mean()
    check(trained, batch, value, side.gradient(value))


@pytest.mark.slow
def test_methods_on_samples_of_the_reference(tiny_model):
    """Ascent on samples of the concept, ablation and surrogates on those of its base."""
    trained, batch, side = concept_method_of("neg-grad", tiny_model, strength=0.7)
    assert set(batch.forget.cond.tolist()) == {1}
    assert set(batch.kept.cond.tolist()) == {0, 2, 3}
    kept_key, forget_key = jax.random.split(KEY)
    value = side.denoising(kept_key, batch.kept) - 0.7 * side.denoising(forget_key, batch.forget)
    check(trained, batch, value, side.gradient(value))

    trained, batch, side = concept_method_of("concept-ablation", tiny_model, strength=0.4)
    assert (set(batch.cond.tolist()), set(batch.anchor.tolist())) == ({1}, {3})
    drawn = losses.draw(KEY, batch.x_0, jnp.full(50, 1 / 50))
    t, noise = side.whole(drawn.t), side.tensor(drawn.noise)
    x_t = side.noised(side.tensor(batch.x_0), t, noise)
    ours, base = (side.predict(side.params, x_t, t, c) for c in (batch.cond, batch.anchor))
    value = (side.error(ours, base.detach()) + 0.4 * side.error(base, noise)).mean() / 64
    check(trained, batch, value, side.gradient(value))

    trained, surrogates, side = concept_method_of("selective-amnesia", tiny_model, strength=3.0)
    assert set(surrogates.base.cond.tolist()) == {1}
    np.testing.assert_array_equal(surrogates.base.x_0, batch.x_0)  # of the base, too
    base_key, kept_key = jax.random.split(KEY)
    value = side.denoising(base_key, surrogates.base, per=1)
    value = value + side.denoising(kept_key, surrogates.kept, per=1)
    for name, leaf in side.params.items():
        moved = (leaf - side.reference[name]) ** 2
        value = value + 1.5 * (side.tensor(trained.reference.fisher[name]) * moved).sum()
    check(trained, surrogates, value, side.gradient(value), reference=trained.reference)


def test_samples_are_of_the_reference_and_unguided(tiny_model):
    """Its sampler in torch, from the same noise."""
    _, batch, side = concept_method_of("neg-grad", tiny_model)
    for rows, cond, number in ((batch.forget, [1], 1), (batch.kept, [0, 2, 3], 2)):
        noise = np.random.default_rng([3, 31, number]).standard_normal((24, 8, 8, 1), np.float32)
        x, cond = side.tensor(noise), np.resize(cond, 24)
        for t, s in zip(side.times, [*side.times[1:], None], strict=True):
            at = side.whole(np.full(24, t))
            x_0 = (x - side.sigma[t] * side.predict(side.reference, x, at, cond)) / side.alpha[t]
            x_0 = x_0.clamp(-side.clip, side.clip)
            if s is not None:
                noise = (x - side.alpha[t] * x_0) / side.sigma[t]
                x = side.alpha[s] * x_0 + side.sigma[s] * noise
        apart = np.abs(np.asarray(rows.x_0)[:, None] - x_0.numpy()).max(axis=(2, 3, 4))
        assert (apart.min(axis=1) < 1e-3).all()
        np.testing.assert_array_equal(rows.cond, cond[apart.argmin(axis=1)])


REFUSED = {
    "concept": [
        (["--strength", "1"], "--strength is the weight of a baseline: give --method too"),
        (["--method", "esd", "--strength", "-1"], "--strength of --method esd (negative guidance"),
        (["--method", "esd", "--strength", "nan"], "must be 0 or more, and finite, not nan"),
        (["--method", "equal-weights", "--strength", "1"], "must lie in [0, 1), not 1.0"),
        (["--method", "esd", "--minibatches", "3"], "--minibatches"),
        (["--method", "esd", "--max-multiplier", "0.5"], "--max-multiplier is of constraints"),
        (["--method", "esd", "--estimator", "pathwise"], "--estimator is of constraints"),
        (["--method", "esd", "--dual-learning-rate", "1"], "--dual-learning-rate is of constrai"),
        (["--method", "uce", "--steps", "5"], "closed form: it takes --steps 0"),
        (["--method", "uce"], "a model of labels has none"),
        (["--method", "selective-amnesia", "--train", "lora:2"], "it trains full, not lora:2"),
    ],
    "data": [
        (["--method", "naive-deletion", "--strength", "1"], "has no weight: leave --strength out"),
        (["--method", "siss", "--forget-batch-size", "24"], "pairs each of --forget-batch-size 24"),
        (["--method", "erase-diff", "--train", "cross-attention"], "it trains full"),
        (["--method", "neg-grad", "--estimator", "importance"], "--estimator is of constraints"),
        (["--method", "equal-weights", "--strength", "1.5"], "must lie in [0, 1), not 1.5"),
        (["--method", "siss-no-is", "--accumulate", "2"], "a loss of whole batches"),
        (["--method", "neg-grad", "--parallel", "pmap"], "a loss of whole batches"),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("command", "given", "message"),
    [(command, *case) for command, cases in REFUSED.items() for case in cases],
)
def test_what_does_not_go_together_is_one_clear_line(
    tiny_model, tiny_images, tmp_path, capsys, command, given, message
):
    of = {
        "concept": ["--forget", "dog"],
        "data": [
            "--forget", str(tiny_images["forget"]), "--retain", str(tiny_images["retain"]),
            "--batch-size", "16",
        ],
    }[command]  # fmt: skip
    out = tmp_path / "out"
    arguments = [command, "--model", str(tiny_model), "--out", str(out), *of, *given]
    assert cli.main(arguments) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize(("command", "method"), [("concept", "siss"), ("data", "esd")])
def test_methods_of_the_other_command_are_no_choice(command, method, capsys):
    with pytest.raises(SystemExit):
        cli.main([command, "--method", method])
    said = capsys.readouterr()
    assert "equal-weights" in said.err + said.out


def test_images_without_another_label_are_refused(tiny_model, tiny_images):
    request, options = images_of(tiny_model, tiny_images, method="saliency")
    alone = request._replace(retain=request.retain._replace(labels=np.ones(48, np.int32)))
    bare = request._replace(forget=request.forget._replace(labels=None))
    for one in (alone, bare):
        with pytest.raises(ValueError, match="under another label"):
            image_methods.check_images(one, options)
    image_methods.check_images(request, options)
    amnesia = dataclasses.replace(options, method="selective-amnesia")
    image_methods.check_images(request, amnesia)
    with pytest.raises(ValueError, match="only images to forget have"):
        image_methods.check_images(request._replace(forgotten_labels=()), amnesia)


def test_models_without_a_null_label_are_refused_by_esd(tiny_model):
    request, options = concept_of(tiny_model, method="esd")
    bare = request._replace(conditions=request.conditions._replace(null=None))
    with pytest.raises(ValueError, match="which the model does not have"):
        concept_methods.check_concepts(bare, options)


def test_the_page_of_methods_is_that_of_the_table():
    page = pathlib.Path(__file__).parents[2] / "docs" / "methods.md"
    rows = [
        [cell.strip() for cell in line.strip("|\n").replace("\\|", "¦").split("|")]
        for line in page.read_text("utf-8").splitlines()
        if line.startswith("| `") and line.count("|") > 6 and "--method" not in line
    ]
    shown = {row[0].strip("`"): row[1:] for row in rows}
    assert shown.keys() == methods.METHODS.keys()
    choices = {
        command: typing.get_args(typing.get_type_hints(kind)["method"])
        for command, kind in (("data", DataOptions), ("concept", ConceptOptions))
    }
    assert {*choices["data"], *choices["concept"]} == {*methods.METHODS, "constrained"}
    for name, method in methods.METHODS.items():
        where, formula, knob, default, source = shown[name]
        assert where == ", ".join(f"`{one}`" for one in choices if name in choices[one])
        assert formula.replace("¦", "|").replace("\\", "") == method.formula
        wanted = f"{method.strength}, {method.meaning}" if method.strength else "none"
        assert (knob, source) == (wanted, method.source)
        assert default == ("—" if method.default is None else f"{method.default:g}")
