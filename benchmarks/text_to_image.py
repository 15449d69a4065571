"""What an on-policy step of a text-conditional network costs against ESD's in torch.

    python benchmarks/text_to_image.py [--network tiny|bk-sdm-tiny|sd-1] [--quick]

ours: one primal-dual step of reverse KL on latents, by each estimator; cross-attention trains
(`jax_unlearn.pretrained.subsets`), the empty prompt is the base and the concept is what is
forgotten.
torch: one step of ESD (Gandikota et al. 2023, 2303.07345) on diffusers' UNet2DConditionModel with
the same random weights: DDIM from noise with guidance to a random one of its steps, the frozen
network at the concept and at the empty prompt there, the squared distance to
e_0 - eta (e_c - e_0), and Adam on cross-attention. Before anything is timed, its states, loss and
gradient are compared with those of `baselines` on the same noise.

A pass is one row through a network in one direction; a training point is a row that went backward
through the trained network. Both are counted while steps run, in ours by a denoiser that reports
to the host and in torch by hooks. ESD draws how many steps it samples, so that its step takes more
or less; judge by milliseconds a pass. Passes are counted, and states compared, on the tiny network:
neither depends on the size.

All variants alternate in one process, so that a busy machine slows them alike: judge by the
ratios. Peak memory is that of a process of its own for each variant, less what was resident when
all was imported; compiling is in it. On a GPU, where both run if JAX finds one, it is the most that
the allocator of JAX, or of torch, had given out.

--dtype bfloat16 computes in it with float32 parameters, torch by autocast. float32 has the default
precision of both on a GPU, TensorFloat-32 (torch is told to use it for matrix products too).
"""

import argparse
import collections
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np
import optax
from memory import config_of, forget_peak, random_params, resident

import jax_unlearn
from jax_unlearn import Batch, Conditions, baselines, reverse_kl, samplers, schedules, sharding
from jax_unlearn.models.unet_2d_condition import (
    UNet2DConditionConfig,
    UNet2DConditionDenoiser,
    UNet2DConditionModel,
)
from jax_unlearn.pretrained.networks import Network, load_network, save_network
from jax_unlearn.pretrained.subsets import subset_optimizer, subset_problem
from jax_unlearn.pretrained.weights import diffusers_key

NETWORKS = {
    "tiny": {
        "channels": (64, 128), "layers_per_block": 1, "attention_head_dim": 4,
        "cross_attention_dim": 128, "mid_block_type": None, "sample_size": 8,
    },
    "bk-sdm-tiny": {
        "channels": (320, 640, 1280), "layers_per_block": 1, "attention_head_dim": 8,
        "cross_attention_dim": 768, "mid_block_type": None, "sample_size": 16,
    },
    "sd-1": {
        "channels": (320, 640, 1280, 1280), "attention_head_dim": 8, "cross_attention_dim": 768,
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3, "sample_size": 64,
    },
}  # fmt: skip
TOKENS = {"tiny": 32, "bk-sdm-tiny": 77, "sd-1": 77}
SCHEDULER = {
    "_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085,
    "beta_end": 0.012, "num_train_timesteps": 1000, "clip_sample": False,
    "set_alpha_to_one": False, "steps_offset": 1,
}  # fmt: skip
LEARNING_RATE = 1e-5
TOLERANCE = 1e-3
ESTIMATORS = ("stop_gradient", "bounded", "pathwise")
VARIANTS = (*ESTIMATORS, "torch")


def config_for(options):
    changes = dict(NETWORKS[options.network])
    if options.size:
        changes["sample_size"] = options.size
    return config_of(changes.pop("channels"), **changes)


def conditions(options):
    """Encoded concepts and the empty prompt, each [rows, tokens, width]; not what CLIP makes."""
    width = NETWORKS[options.network]["cross_attention_dim"]
    rng = np.random.default_rng(1)
    shape = options.rows, TOKENS[options.network], width
    concept = rng.standard_normal(shape).astype(np.float32)
    empty = np.broadcast_to(rng.standard_normal((1, *shape[1:])).astype(np.float32), shape)
    return concept, empty.copy()


def batch_of(options):
    concept, empty = (jnp.asarray(part) for part in conditions(options))
    return Batch(None, Conditions(concept, empty, concept, np.zeros(options.rows, int)))


def counting(apply, tally):
    """The same denoiser; each pass over n rows that is executed adds n to the tally.

    The count hangs on the input of a pass: it is made exactly if something of the pass is used.
    """

    def note(kind, x):
        def count(zero):
            tally[kind] += x.shape[0]
            return zero

        return x + jax.pure_callback(count, jax.ShapeDtypeStruct((), x.dtype), 0.0 * x.ravel()[0])

    @jax.custom_vjp
    def counted(params, x_t, t, cond):
        return apply(params, note("forward", x_t), t, cond)

    def forward(params, x_t, t, cond):
        return jax.vjp(lambda p, x: apply(p, x, t, cond), params, note("forward", x_t))

    def backward(vjp, cotangent):
        return *vjp(note("backward", cotangent)), None, None

    counted.defvjp(forward, backward)
    return counted


class Ours:
    """The step of one estimator; a call takes it."""

    def __init__(self, estimator, network, options, tallies=None):
        module_config, schedule = network.module.config, schedules.from_diffusers(SCHEDULER)
        apply = reference_apply = UNet2DConditionDenoiser(
            module_config, options.dtype and jnp.dtype(options.dtype), options.remat
        )
        if tallies is not None:
            apply, reference_apply = (counting(apply, tally) for tally in tallies)
        problem = reverse_kl(
            apply, schedule, shape=module_config.sample_shape, steps=options.chain_steps,
            estimator=estimator, reference_apply=reference_apply,
        )  # fmt: skip
        optimizer = subset_optimizer(optax.adam(LEARNING_RATE), "cross-attention")
        problem = subset_problem(problem, "cross-attention")
        algorithm = jax_unlearn.primal_dual(problem, optimizer, optax.sgd(1e-4))
        self.reference = network.params
        self.state = algorithm.init(self.reference, 1.0, multipliers=0.5)
        self.step, self.batch = sharding.jit_step(algorithm.step), batch_of(options)
        self.number = 0

    def __call__(self):
        key = jax.random.key(self.number)
        self.state, info = self.step(key, self.state, self.reference, self.batch)
        self.number += 1
        jax.block_until_ready((self.state, info))


def count_passes(estimator, network, options):
    """Passes of one step that is run: {"forward", "backward", "points"}."""
    trained, reference = collections.Counter(), collections.Counter()
    once = Ours(estimator, network, options, (trained, reference))
    trained.clear()
    reference.clear()
    once()
    jax.effects_barrier()
    both = trained + reference
    return {**{kind: both[kind] for kind in ("forward", "backward")}, "points": trained["backward"]}


class Esd:
    """A step of ESD by hand; a call takes it.

    Args:
      folder: of the network.
      options: guidance and strength, and esd_steps of the sampler.
      concept: hidden states of what is forgotten, [rows, tokens, width].
      empty: of the prompt that it is held to.
      scheduler: a configuration of DDIM.
      trains: which parameters, by their names.
      rate: of Adam.
      seed: of noise and of steps.
      low: whether to compute in bfloat16.
    """

    def __init__(
        self, folder, options, concept, empty, *,
        scheduler=SCHEDULER, trains=lambda name: "attn2" in name, rate=LEARNING_RATE, seed=0,
        low=False,
    ):  # fmt: skip
        import torch
        from diffusers import DDIMScheduler, UNet2DConditionModel

        torch.set_num_threads(len(os.sched_getaffinity(0)))
        self.torch, self.options, self.low = torch, options, low
        self.device = "cuda" if jax.default_backend() == "gpu" else "cpu"
        self.model, self.reference = (
            UNet2DConditionModel.from_pretrained(folder, low_cpu_mem_usage=False).to(self.device)
            for _ in range(2)
        )
        self.reference.requires_grad_(False)
        self.trained = {}
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(trains(name))
            if trains(name):
                self.trained[name] = parameter
        self.optimizer = torch.optim.Adam(self.trained.values(), lr=rate)
        self.scheduler = DDIMScheduler.from_config(scheduler)
        self.scheduler.set_timesteps(options.esd_steps)
        self.concept, self.empty = (
            torch.tensor(np.asarray(part), device=self.device) for part in (concept, empty)
        )
        self.both = torch.cat([self.concept, self.empty])
        config = self.model.config
        self.shape = len(concept), config.in_channels, config.sample_size, config.sample_size
        self.passes = collections.Counter()
        for network in (self.model, self.reference):
            network.register_forward_hook(self.count)
        self.counts = np.random.default_rng(seed)
        self.noise = torch.Generator().manual_seed(seed)

    def count(self, network, inputs, output):
        def backward(gradient):
            self.passes["backward"] += len(gradient)
            self.passes["points"] += len(gradient) * (network is self.model)

        self.passes["forward"] += len(output.sample)
        if output.sample.requires_grad:
            output.sample.register_hook(backward)

    def predict_both(self, network, x_t, t):
        with self.torch.no_grad():
            return network(self.torch.cat([x_t, x_t]), t, self.both).sample.chunk(2)

    def loss(self, noise, count):
        """The state that is sampled, and the loss there."""
        x_t = noise
        for t in self.scheduler.timesteps[:count]:
            concept, empty = self.predict_both(self.model, x_t, t)
            guided = empty + self.options.guidance * (concept - empty)
            x_t = self.scheduler.step(guided, t, x_t).prev_sample
        t = self.scheduler.timesteps[count]
        concept, empty = self.predict_both(self.reference, x_t, t)
        target = empty - self.options.strength * (concept - empty)
        ours = self.model(x_t, t, self.concept).sample
        return x_t, self.torch.nn.functional.mse_loss(ours, target)

    def __call__(self):
        count = int(self.counts.integers(self.options.esd_steps))
        noise = self.torch.randn(self.shape, generator=self.noise).to(self.device)
        with self.torch.autocast(self.device, self.torch.bfloat16, enabled=self.low):
            _, loss = self.loss(noise, count)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        if self.device == "cuda":
            self.torch.cuda.synchronize()


def compare(network, esd, options, count=2, factor=1.05):
    """Relative differences of torch's state, loss and gradient from ours, on the same noise.

    The trained network is the reference with what trains scaled. In full float32.
    """
    torch, apply = esd.torch, UNet2DConditionDenoiser(network.module.config)
    schedule = schedules.from_diffusers(esd.scheduler.config)
    concept, empty = (jnp.asarray(part.cpu().numpy()) for part in (esd.concept, esd.empty))

    def name_of(path):
        return diffusers_key(tuple(part.key for part in path))

    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: factor * leaf if name_of(path) in esd.trained else leaf, network.params
    )
    noise = np.random.default_rng(2).standard_normal(esd.shape).astype(np.float32)

    @jax.jit
    def evaluate(params, reference, start):
        x_t, time = baselines.partial_sample(
            samplers.guided(apply, params, concept, unconditional=empty, scale=options.guidance),
            schedule, start, steps=options.esd_steps, count=count,
        )  # fmt: skip
        t = jnp.full(x_t.shape[:1], time)
        target = baselines.esd_target(
            apply, reference, concept, null=empty, strength=options.strength
        )(x_t, t)

        def loss(params):
            return jnp.square(apply(params, x_t, t, concept) - target).mean()

        return x_t, *jax.value_and_grad(loss)(params)

    with jax.default_matmul_precision("highest"):
        x_t, loss, gradient = evaluate(params, network.params, noise.transpose(0, 2, 3, 1))
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    with torch.no_grad():
        for parameter in esd.trained.values():
            parameter.mul_(factor)
    their_x_t, their_loss = esd.loss(torch.tensor(noise, device=esd.device), count)
    their_loss.backward()
    expected, found = [], []
    for path, leaf in jax.tree_util.tree_flatten_with_path(gradient)[0]:
        if name_of(path) in esd.trained:
            # Kernels are [(height, width,) in, out] here, and [out, in(, height, width)] there.
            leaf = np.asarray(leaf)
            leaf = np.moveaxis(leaf, (-1, -2), (0, 1)) if leaf.ndim > 1 else leaf
            expected.append(leaf.ravel())
            found.append(esd.trained[name_of(path)].grad.cpu().numpy().ravel())
    assert len(found) == len(esd.trained)

    def relative(found, expected):
        return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))

    return {
        "state": relative(their_x_t.cpu().numpy().transpose(0, 2, 3, 1), np.asarray(x_t)),
        "loss": abs(their_loss.item() / float(loss) - 1),
        "gradient": relative(np.concatenate(found), np.concatenate(expected)),
    }


def make(name, folder, options):
    if name == "torch":
        import torch

        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        return Esd(folder, options, *conditions(options), low=options.dtype is not None)
    return Ours(name, load_network(folder), options)


def measure_peak(name, folder, options):
    if name == "torch":
        import diffusers  # noqa: F401
        import torch  # noqa: F401
    jax.block_until_ready(jnp.ones(1) + 1)
    before = forget_peak()
    once = make(name, folder, options)
    ready = resident()
    for _ in range(options.rounds):
        once()
    if jax.default_backend() == "gpu":
        most = jax.devices()[0].memory_stats()["peak_bytes_in_use"]
        if name == "torch":
            most = once.torch.cuda.max_memory_allocated()
        print(json.dumps({"peak on the GPU": most / 2**20}))
        return
    print(json.dumps({"peak": resident("VmHWM") - before, "before the first step": ready - before}))


def write(folder, options):
    """A random network, written to a folder."""
    config = config_for(options)
    module = UNet2DConditionModel(UNet2DConditionConfig.from_diffusers(config))
    network = Network(module, random_params(config), config)
    save_network(folder, network)
    return network


def peak(name, arguments):
    done = subprocess.run(
        [sys.executable, __file__, "--peak", name, *arguments],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def machine():
    model = platform.processor() or platform.machine()
    if jax.default_backend() == "gpu":
        model = f"{jax.devices()[0].device_kind}, {model}"
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    return f"{model}, {cores} of {os.cpu_count()} cores, load {load:.1f}"


def quartiles(values, unit=""):
    low, middle, high = np.percentile(values, [25, 50, 75])
    return f"{middle:.3g}{unit} (quartiles {low:.3g} to {high:.3g})"


def benchmark(names, folder, options):
    network = load_network(folder)
    passes, seconds = {name: [] for name in names}, {name: [] for name in names}
    tiny = argparse.Namespace(**{**vars(options), "network": "tiny", "size": None, "dtype": None})
    small = write(folder / "tiny", tiny)
    if "torch" in names:
        differences = compare(small, Esd(folder / "tiny", tiny, *conditions(tiny)), tiny)
        listed = ", ".join(f"{name} {value:.1e}" for name, value in differences.items())
        print(f"torch against ours on the same noise, relative: {listed}", flush=True)
        if max(differences.values()) > TOLERANCE:
            sys.exit(f"the torch step is not the same computation: above {TOLERANCE}.")

    def begin(name):
        if name != "torch":
            with jax.default_device(jax.devices("cpu")[0]):
                passes[name] = [count_passes(name, small, tiny)] * options.rounds
        once = Ours(name, network, options) if name != "torch" else make(name, folder, options)
        started = time.perf_counter()
        once()
        print(f"{name}: first step {time.perf_counter() - started:.1f} s", flush=True)
        return once

    # Compiling large networks takes minutes, in threads of its own.
    with ThreadPoolExecutor() as pool:
        steps = dict(zip(names, pool.map(begin, names), strict=True))
    for _ in range(options.rounds):
        for name in names:
            if name == "torch":
                steps[name].passes.clear()
            started = time.perf_counter()
            steps[name]()
            seconds[name].append(time.perf_counter() - started)
            if name == "torch":
                passes[name].append(dict(steps[name].passes))
    each = {}
    for name in names:
        mean = {kind: np.mean([one[kind] for one in passes[name]]) for kind in passes[name][0]}
        all_passes = np.array([one["forward"] + one["backward"] for one in passes[name]])
        milliseconds = 1e3 * np.array(seconds[name])
        each[name] = milliseconds / all_passes
        points = mean["points"] / all_passes.mean()
        print(f"{name}:")
        print(f"  a step {quartiles(milliseconds, ' ms')}, a pass {quartiles(each[name], ' ms')}")
        print(
            f"  {mean['forward']:.1f} forward and {mean['backward']:.1f} backward passes a step, "
            f"{mean['points']:.1f} training points: {points:.3g} a pass, "
            f"{milliseconds.sum() / (mean['points'] * options.rounds):.3g} ms a point"
        )
    for name in names:
        if name != "torch" and "torch" in names:
            print(
                f"{name} / torch, milliseconds a pass: {quartiles(each[name] / each['torch'])}, "
                "of pairs"
            )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", choices=list(NETWORKS), default="tiny")
    parser.add_argument("--size", type=int, help="side of the latents; default 8, or 16")
    parser.add_argument("--rows", type=int, default=1, help="trajectories of a step")
    parser.add_argument("--chain-steps", type=int, default=20, help="of the reverse-KL chain")
    parser.add_argument("--esd-steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=3.0, help="of ESD's sampling")
    parser.add_argument("--strength", type=float, default=1.0, help="ESD's eta")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--dtype", choices=["bfloat16"], help="computing dtype; default float32")
    parser.add_argument("--remat", action="store_true", help="ours with rematerialised blocks")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--quick", action="store_true", help="a smoke run: short chains")
    parser.add_argument("--skip-memory", action="store_true")
    parser.add_argument("--peak", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=pathlib.Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.chain_steps, options.esd_steps = 3, 6
    options.rounds = options.rounds or (3 if options.quick else 20)
    if options.peak:
        measure_peak(options.peak, options.folder, options)
        return

    names = options.variants
    packages = ["jax", "jaxlib", "flax", "optax", *(["torch", "diffusers"] * ("torch" in names))]
    print(machine(), f"; python {platform.python_version()}", sep="")
    print(", ".join(f"{name} {version(name)}" for name in packages))
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary) / "unet"
        _, params, config = write(folder, options)
        count = sum(leaf.size for leaf in jax.tree.leaves(params)) / 1e6
        del params
        print(
            f"{options.network}: {count:.1f} million parameters, {options.dtype or 'float32'}"
            f"{', rematerialised' * options.remat}, latents of side "
            f"{config['sample_size']}, {options.rows} rows, chains of {options.chain_steps} steps, "
            f"ESD's of {options.esd_steps}, {options.rounds} alternating rounds"
        )
        benchmark(names, folder, options)
        if not options.skip_memory and pathlib.Path("/proc/self/clear_refs").exists():
            arguments = [
                "--network", options.network, "--rows", str(options.rows), "--rounds", "3",
                "--size", str(config["sample_size"]), "--folder", str(folder),
                *(["--dtype", options.dtype] if options.dtype else []),
                *["--remat"] * options.remat,
                *(["--quick"] if options.quick else [
                    "--chain-steps", str(options.chain_steps),
                    "--esd-steps", str(options.esd_steps),
                ]),
            ]  # fmt: skip
            for name in names:
                listed = ", ".join(f"{n} {mib:.0f} MiB" for n, mib in peak(name, arguments).items())
                print(f"memory of {name}: {listed}", flush=True)


if __name__ == "__main__":
    main()
