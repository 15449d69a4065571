"""Models that are small enough to train in a test."""


def write_tiny_model(path, channels, *, levels=1):
    """A random class-conditional UNet of 8×8 grey images: three labels and null.

    Of one level it has no middle, and its step is compiled in half the time.
    """
    import jax

    from jax_unlearn.models.unet_2d import UNet2DConfig, init_params
    from jax_unlearn.pretrained import Pretrained, PretrainedConfig, UNet2DDenoiser, save_pretrained
    from jax_unlearn.schedules import from_diffusers

    unet = {
        "_class_name": "UNet2DModel",
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "layers_per_block": 1,
        "block_out_channels": [channels] * levels,
        "down_block_types": ["DownBlock2D"] * levels,
        "up_block_types": ["UpBlock2D"] * levels,
        "norm_num_groups": 4,
        "add_attention": False,
        "num_class_embeds": 4,
    }
    if levels == 1:
        unet["mid_block_type"] = None
    scheduler = {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 50}
    params = init_params(unet, jax.random.key(0))
    config = PretrainedConfig(unet, scheduler, {0: "cat", 1: "dog", 2: "T-shirt/top"}, 3)
    denoiser = UNet2DDenoiser(UNet2DConfig.from_diffusers(unet), 3)
    save_pretrained(path, Pretrained(denoiser, params, from_diffusers(scheduler), config))
    return path
