"""Host memory that loading and saving a checkpoint take, beside the parameters themselves.

    python benchmarks/memory.py [--size tiny|small|medium] [--folder DIR]

A random UNet2DConditionModel is written as a folder of float32 safetensors. Then each of these
runs in a process of its own:

load: `load_network`; the peak over the size of the file. 1 is the parameters alone.
start: `load_network` and the state of a run, whose trained parameters are a copy and whose
reference is what was loaded; 2 is the two of them.
save: `save_network` of what was loaded; what the peak adds to what was there before.

Peaks are those of resident memory (VmHWM) less what was resident when all was imported and a first
array made. Tracing the network for its shapes counts, and weighs more in a small one.
"""

import argparse
import ctypes
import json
import pathlib
import subprocess
import sys
import tempfile

import numpy as np

MIB = 2**20
MEASURED = ("load", "start", "save")
CHANNELS = {"tiny": (32, 64), "small": (128, 256, 512), "medium": (256, 512, 1024)}


def config_of(channels, **changes):
    """A text-conditional network with cross-attention at every level."""
    count = len(channels)
    return {
        "_class_name": "UNet2DConditionModel",
        "sample_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": list(channels),
        "down_block_types": ["CrossAttnDownBlock2D"] * count,
        "up_block_types": ["CrossAttnUpBlock2D"] * count,
        "layers_per_block": 2,
        "attention_head_dim": 8,
        "cross_attention_dim": 768,
        "norm_num_groups": 32,
        **changes,
    }


def random_params(config, seed=0):
    """Kernels of variance 1 / (values that enter an output), small biases, norms near 1."""
    import jax

    from jax_unlearn.models.unet_2d_condition import UNet2DConditionConfig, param_shapes

    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        values = rng.standard_normal(leaf.shape, np.float32)
        if path[-1].key == "kernel":
            return values / np.float32(np.sqrt(np.prod(leaf.shape[:-1])))
        return np.float32(path[-1].key == "scale") + np.float32(0.05) * values

    shapes = param_shapes(UNet2DConditionConfig.from_diffusers(config))
    return jax.tree_util.tree_map_with_path(draw, shapes)


def write(folder, channels):
    """Makes the folder; MiB of its largest tensor and of all."""
    import jax

    from jax_unlearn.models.unet_2d_condition import UNet2DConditionConfig, UNet2DConditionModel
    from jax_unlearn.pretrained.networks import Network, save_network

    config = config_of(channels)
    module = UNet2DConditionModel(UNet2DConditionConfig.from_diffusers(config))
    params = random_params(config)
    save_network(folder, Network(module, params, config))
    sizes = [leaf.nbytes / MIB for leaf in jax.tree.leaves(params)]
    return {"largest": max(sizes), "all": sum(sizes)}


def resident(name="VmRSS"):
    # Not ru_maxrss, which starts from what the parent had when it forked.
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.split(f"{name}:")[1].split()[0]) / 1024


def forget_peak():
    """Gives back what was freed, and lets the peak start from here."""
    ctypes.CDLL(None).malloc_trim(0)
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    return resident()


def measure(what, folder):
    """MiB that were added at the peak, and at the end, of loading, starting or saving."""
    import jax
    import jax.numpy as jnp
    import optax

    import jax_unlearn
    from jax_unlearn.multipliers import non_negative
    from jax_unlearn.pretrained.networks import load_network, save_network

    jax.block_until_ready(jnp.ones(1) + 1)
    before = forget_peak()
    network = load_network(folder)
    jax.block_until_ready(network.params)
    if what == "start":
        problem = jax_unlearn.Problem(lambda *_: None, 1.0, non_negative(), "none")
        algorithm = jax_unlearn.primal_dual(problem, optax.sgd(0.1), optax.sgd(0.1))
        jax.block_until_ready(algorithm.init(network.params, 0.0))
    if what == "save":
        before = forget_peak()
        save_network(folder.with_name("saved"), network, overwrite=True)
    return {"peak": resident("VmHWM") - before, "end": resident() - before}


def in_process(*arguments):
    done = subprocess.run(
        [sys.executable, __file__, *arguments], check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=list(CHANNELS), default="small")
    parser.add_argument(
        "--folder", type=pathlib.Path, help="for the files; default a temporary one"
    )
    parser.add_argument(
        "--only", choices=["write", "load", "start", "save"], help=argparse.SUPPRESS
    )
    options = parser.parse_args()
    if not pathlib.Path("/proc/self/clear_refs").exists():
        sys.exit("resident memory is read from /proc, which is not here: run this on Linux.")
    if options.only:
        if options.only == "write":
            print(json.dumps(write(options.folder, CHANNELS[options.size])))
        else:
            print(json.dumps(measure(options.only, options.folder)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = ["--folder", str(pathlib.Path(temporary) / "network"), "--size", options.size]
        size = in_process("--only", "write", *folder)
        print(f"parameters {size['all']:.0f} MiB, the largest {size['largest']:.1f} MiB")
        for what in MEASURED:
            got = in_process("--only", what, *folder)
            print(
                f"{what:5} peak {got['peak']:7.1f} MiB, {got['peak'] / size['all']:.3f} of the "
                f"parameters, {got['peak'] / size['largest']:.1f} of the largest; "
                f"at the end {got['end']:.1f} MiB"
            )


if __name__ == "__main__":
    main()
