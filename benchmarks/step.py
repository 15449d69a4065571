"""What one primal-dual step costs, against its floor and against torch, on the embedded model.

    python benchmarks/step.py [--quick] [--skip-torch]

floor: the frozen forward on the kept rows, the trained forward on all rows and one backward,
compiled, with noise, noisy images and targets given: no draws, no optimizer, no dual update.
torch: the same step by hand on diffusers' UNet2DModel with the same weights. Before anything is
timed its losses and gradient are compared with ours on the same noise.

All variants alternate in one process, so that a busy machine slows them alike: judge by the
ratios. Peak memory is that of a process of its own for each variant, which does the same steps.
"""

import argparse
import json
import os
import pathlib
import platform
import subprocess
import sys
import time
from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jax_unlearn
from jax_unlearn import losses, multipliers, schedules
from jax_unlearn.app import embedded
from jax_unlearn.pretrained.weights import diffusers_key

KEPT = BASE = FORGET = 32
LEARNING_RATE, B1, B2 = 5e-4, 0.9, 0.99
DUAL = {"integral": 1.0, "proportional": 10.0, "nu": 0.9}
THRESHOLD = 0.075
TOLERANCE = 1e-4


def make(rows):
    """The model, its weighting, the algorithm, and a batch of `rows` images a part."""
    model = jax_unlearn.load_pretrained(embedded.model_path())
    steps = model.schedule.num_steps
    weighting = losses.time_weighting(losses.simple_weights(steps, 28 * 28))
    problem = jax_unlearn.forward_kl(model.apply, model.schedule, weighting)
    optimizer = optax.adam(LEARNING_RATE, b1=B1, b2=B2)
    algorithm = jax_unlearn.primal_dual(problem, optimizer, multipliers.nu_pi(**DUAL))
    images = embedded.load_data().train
    pixels = jnp.asarray(images.pixels[: 3 * rows] / 127.5 - 1, jnp.float32)
    parts = [
        (pixels[i * rows : (i + 1) * rows], jnp.asarray(images.labels[i * rows : (i + 1) * rows]))
        for i in range(3)
    ]
    batch = jax_unlearn.Batch(
        kept=jax_unlearn.Images(*parts[0]),
        base=jax_unlearn.Images(*parts[1]),
        forget=jax_unlearn.Images(*parts[2], jnp.zeros(rows, jnp.int32)),
    )
    return model, weighting, problem, algorithm, batch


def draws(key, weighting, batch):
    """The noise and times that the losses draw: of base, kept and forgotten images in turn."""
    parts = (batch.base, batch.kept, batch.forget)
    drawn = [
        losses.draw(part_key, part.x_0, weighting.probabilities)
        for part_key, part in zip(jax.random.split(key, 3), parts, strict=True)
    ]
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *drawn)


def ours(rows):
    """The step: a function of no arguments that takes one, and what compiling it took."""
    model, _, _, algorithm, batch = make(rows)
    state, key = algorithm.init(model.params, [THRESHOLD]), jax.random.key(0)
    times = [time.perf_counter()]
    step = jax.jit(algorithm.step, donate_argnums=1)
    traced = step.trace(key, state, model.params, batch)
    times.append(time.perf_counter())
    lowered = traced.lower()
    times.append(time.perf_counter())
    compiled = lowered.compile()
    times.append(time.perf_counter())

    def once():
        nonlocal state
        state, info = compiled(jax.random.fold_in(key, 1), state, model.params, batch)
        jax.block_until_ready((state, info))

    names = ("trace", "lower", "compile")
    parts = zip(names, np.diff(times), strict=True)
    listed = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in parts)
    return once, f"{listed}; {buffers(compiled)}"


def buffers(compiled):
    """What XLA plans to hold beside arguments and results; peak residence includes compiling."""
    return f"temporary buffers {compiled.memory_analysis().temp_size_in_bytes / 2**20:.0f} MiB"


def floor(rows):
    """Two forwards and a backward, with everything else given."""
    model, weighting, _, _, batch = make(rows)
    drawn = draws(jax.random.key(0), weighting, batch)
    parts = (batch.base, batch.kept, batch.forget)
    x_0 = jnp.concatenate([part.x_0 for part in parts])
    cond = jnp.concatenate([part.cond for part in parts])
    x_t = schedules.add_noise(x_0=x_0, noise=drawn.noise, log_snr=model.schedule.log_snr[drawn.t])
    kept = slice(rows, 2 * rows)

    @jax.jit
    def evaluate(params, reference, x_t, t, cond, noise):
        frozen = model.apply(reference, x_t[kept], t[kept], cond[kept])
        target = jnp.concatenate([noise[:rows], frozen, noise[2 * rows :]])

        def loss(params):
            return jnp.square(model.apply(params, x_t, t, cond) - target).mean()

        return jax.value_and_grad(loss)(params)

    reference = jax.tree.map(jnp.copy, model.params)
    given = (model.params, reference, x_t, drawn.t, cond, drawn.noise)
    compiled = evaluate.lower(*given).compile()
    return lambda: jax.block_until_ready(compiled(*given)), buffers(compiled)


class TorchStep:
    """The same step by hand: two-term losses, frozen reference, νPI dual, Adam."""

    def __init__(self, rows):
        import torch
        from diffusers import UNet2DModel

        torch.set_num_threads(len(os.sched_getaffinity(0)))
        self.torch = torch
        model, weighting, _, _, batch = make(rows)
        folder = embedded.model_path() / "unet"
        self.model = UNet2DModel.from_pretrained(folder, low_cpu_mem_usage=False)
        self.reference = UNet2DModel.from_pretrained(folder, low_cpu_mem_usage=False)
        self.reference.requires_grad_(False)
        parts = (batch.base, batch.kept, batch.forget)
        self.x_0 = self.channels_first(np.concatenate([part.x_0 for part in parts]))
        self.cond = torch.tensor(np.concatenate([part.cond for part in parts])).long()
        log_snr = torch.tensor(np.asarray(model.schedule.log_snr), dtype=torch.float64)
        self.alpha = torch.sigmoid(log_snr).sqrt().float()
        self.sigma = torch.sigmoid(-log_snr).sqrt().float()
        self.scale = torch.tensor(np.asarray(weighting.weights / weighting.probabilities))
        self.steps, self.rows = len(log_snr), rows
        self.optimizer = torch.optim.Adam(
            self.model.parameters(), lr=LEARNING_RATE, betas=(B1, B2), eps=1e-8
        )
        self.multiplier, self.smoothed = torch.zeros(()), None

    def channels_first(self, images):
        return self.torch.tensor(np.asarray(images).transpose(0, 3, 1, 2).copy())

    def draw(self):
        torch = self.torch
        times = []
        for _ in range(3):
            u = (torch.arange(self.rows) + torch.rand(self.rows)) / self.rows + torch.rand(())
            times.append(((u % 1.0) * self.steps).long().clamp(max=self.steps - 1))
        return torch.randn_like(self.x_0), torch.cat(times)

    def losses(self, noise, t):
        torch, rows = self.torch, self.rows
        kept = slice(rows, 2 * rows)
        alpha, sigma = self.alpha[t, None, None, None], self.sigma[t, None, None, None]
        x_t = alpha * self.x_0 + sigma * noise
        with torch.no_grad():
            frozen = self.reference(x_t[kept], t[kept], self.cond[kept]).sample
        target = torch.cat([noise[:rows], frozen, noise[2 * rows :]])
        ours = self.model(x_t, t, self.cond).sample
        # Constraint values are of the chain that is sampled, which clips its estimate of x_0.
        clipped = (x_t - (x_t - sigma * ours).clamp(-alpha, alpha)) / sigma
        ours = torch.cat([ours[: 2 * rows], clipped[2 * rows :]])
        error = (ours - target).square().sum((1, 2, 3))
        error = self.scale[t] * error
        return error[: 2 * rows].mean(), error[2 * rows :].mean()

    def __call__(self):
        torch = self.torch
        objective, value = self.losses(*self.draw())
        with torch.no_grad():
            violation = THRESHOLD - value
            before = violation if self.smoothed is None else self.smoothed
            self.smoothed = DUAL["nu"] * before + (1 - DUAL["nu"]) * violation
            change = DUAL["integral"] * violation + DUAL["proportional"] * (self.smoothed - before)
            self.multiplier = (self.multiplier + change).clamp(min=0.0)
        self.optimizer.zero_grad(set_to_none=True)
        (objective - self.multiplier * value).backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters()])
        if bool(torch.isfinite(norm)):
            self.optimizer.step()


def torch_step(rows):
    return TorchStep(rows), None


def compare(rows, multiplier=0.7):
    """Largest relative differences of torch's losses and gradient from ours, on one noise."""
    model, weighting, problem, _, batch = make(rows)
    key = jax.random.key(7)
    drawn = draws(key, weighting, batch)
    # Not at the reference, where the objective's kept part and its gradient vanish.
    leaves, tree = jax.tree.flatten(model.params)
    rng = np.random.default_rng(0)
    moved = [leaf + 0.02 * leaf.std() * rng.normal(size=leaf.shape) for leaf in leaves]
    params = jax.tree.unflatten(tree, [jnp.asarray(leaf, jnp.float32) for leaf in moved])

    @jax.jit
    def evaluate(params):
        def lagrangian(params):
            value, found = jax_unlearn.lagrangian(
                problem, params, model.params, key, batch, [multiplier], [0.0]
            )
            return value, (found.objective, found.values[0])

        (_, values), gradient = jax.value_and_grad(lagrangian, has_aux=True)(params)
        return values, gradient

    values, gradient = evaluate(params)
    theirs = TorchStep(rows)
    torch, named = theirs.torch, dict(theirs.model.named_parameters())

    def by_name(tree):
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
            names = tuple(part.key for part in path)
            leaf = np.asarray(leaf)
            if names[-1] == "kernel":
                leaf = leaf.transpose(3, 2, 0, 1) if leaf.ndim == 4 else leaf.T
            yield diffusers_key(names), leaf

    with torch.no_grad():
        for name, leaf in by_name(params):
            named[name].copy_(torch.tensor(leaf.copy()))
    t = torch.tensor(np.asarray(drawn.t)).long()
    objective, value = theirs.losses(theirs.channels_first(drawn.noise), t)
    (objective - multiplier * value).backward()
    expected = dict(by_name(gradient))
    assert expected.keys() == named.keys()
    difference = sum(np.sum((named[n].grad.numpy() - g) ** 2.0) for n, g in expected.items())
    norm = sum(np.sum(g**2.0) for g in expected.values())
    return {
        "objective": abs(objective.item() / float(values[0]) - 1),
        "constraint": abs(value.item() / float(values[1]) - 1),
        "gradient": float(np.sqrt(difference / norm)),
    }


VARIANTS = {"ours": ours, "floor": floor, "torch": torch_step}


def peak(name, rows, steps):
    """Peak resident memory in MiB of a process that takes `steps` steps of the variant."""
    arguments = ["--peak", name, "--rows", str(rows), "--rounds", str(steps)]
    done = subprocess.run(
        [sys.executable, __file__, *arguments], check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def measure_peak(name, rows, steps):
    def now():
        # Not ru_maxrss, which starts from what the parent had when it forked.
        status = pathlib.Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 1024

    once, _ = VARIANTS[name](rows)
    ready = now()
    for _ in range(steps):
        once()
    print(json.dumps({"peak": round(now()), "before the first step": round(ready)}))


def machine():
    model = platform.processor() or platform.machine()
    info = pathlib.Path("/proc/cpuinfo")
    if info.is_file():
        lines = info.read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if "model name" in line), model)
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    return f"{model}, {cores} of {os.cpu_count()} cores, load {load:.1f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a smoke run: small batch, few rounds")
    parser.add_argument("--skip-torch", action="store_true", help="without the torch extra")
    parser.add_argument("--skip-memory", action="store_true")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--rows", type=int, help="images of each of the three parts")
    parser.add_argument("--peak", choices=list(VARIANTS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    rows = options.rows or (4 if options.quick else KEPT)
    rounds = options.rounds or (3 if options.quick else 20)
    if options.peak:
        measure_peak(options.peak, rows, rounds)
        return

    names = [name for name in VARIANTS if not (options.skip_torch and name == "torch")]
    packages = ["jax", "jaxlib", "flax", "optax", *(["torch", "diffusers"] * ("torch" in names))]
    print(machine(), f"; python {platform.python_version()}", sep="")
    print(", ".join(f"{name} {version(name)}" for name in packages))
    print(f"batch {rows} kept + {rows} base + {rows} forgotten, {rounds} alternating rounds")
    if "torch" in names:
        differences = compare(rows)
        listed = ", ".join(f"{name} {value:.1e}" for name, value in differences.items())
        print(f"torch against ours on the same noise, relative: {listed}")
        if max(differences.values()) > TOLERANCE:
            sys.exit(f"the torch step is not the same computation: above {TOLERANCE}.")
    steps, seconds = {}, {name: [] for name in names}
    for name in names:
        steps[name], compiling = VARIANTS[name](rows)
        if compiling:
            print(f"{name}: {compiling}")
        steps[name]()
    for _ in range(rounds):
        for name in names:
            started = time.perf_counter()
            steps[name]()
            seconds[name].append(time.perf_counter() - started)
    for name in names:
        low, middle, high = np.percentile(seconds[name], [25, 50, 75]) * 1e3
        print(
            f"{name:6} median {middle:7.1f} ms (quartiles {low:.1f} to {high:.1f}, "
            f"least {1e3 * min(seconds[name]):.1f})"
        )
    for name in names[1:]:
        ratio = np.array(seconds["ours"]) / np.array(seconds[name])
        low, middle, high = np.percentile(ratio, [25, 50, 75])
        least = min(seconds["ours"]) / min(seconds[name])
        print(
            f"ours / {name}: {middle:.3f} (median of pairs; quartiles {low:.3f} to {high:.3f}; "
            f"of the least {least:.3f})"
        )
    if not options.skip_memory and pathlib.Path("/proc/self/status").is_file():
        for name in names:
            listed = ", ".join(f"{n} {mib} MiB" for n, mib in peak(name, rows, 3).items())
            print(f"memory of {name}: {listed}")


if __name__ == "__main__":
    main()
