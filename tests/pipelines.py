"""Folders of tiny random pipelines from text to image, as diffusers writes them."""

import json

import jax
from clip_vocabulary import END, START, VOCABULARY, write_tokenizer

from jax_unlearn.models import autoencoder_kl, clip_text, unet_2d_condition
from jax_unlearn.models.initialisation import random_params
from jax_unlearn.pretrained.networks import write_network

UNET = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 8,
    "block_out_channels": [8, 16],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 2,
    "cross_attention_dim": 8,
}
# What changes for a run from end to end: its step is compiled in half the time.
ONE_LEVEL = {
    "block_out_channels": [8],
    "down_block_types": ["CrossAttnDownBlock2D"],
    "mid_block_type": None,
    "up_block_types": ["CrossAttnUpBlock2D"],
}
# Six sizes of 8 values each beside the 10 of the pooled text.
UNET_XL = UNET | {
    "cross_attention_dim": 20,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 58,
    "use_linear_projection": True,
}
VAE = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [4, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "norm_num_groups": 2,
    "sample_size": 16,
    "scaling_factor": 0.5,
}
TEXT_ENCODER = {
    "architectures": ["CLIPTextModel"],
    "model_type": "clip_text_model",
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 3,
    "vocab_size": len(VOCABULARY),
    "bos_token_id": VOCABULARY[START],
    "eos_token_id": VOCABULARY[END],
    "pad_token_id": VOCABULARY[END],
    "max_position_embeddings": 77,
}
TEXT_ENCODER_2 = TEXT_ENCODER | {
    "architectures": ["CLIPTextModelWithProjection"],
    "hidden_size": 12,
    "hidden_act": "gelu",
    "projection_dim": 10,
}
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "_diffusers_version": "0.35.0",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def shapes(name, config):
    if name == "unet":
        network = unet_2d_condition.UNet2DConditionConfig.from_diffusers(config)
        return unet_2d_condition.param_shapes(network)
    if name == "vae":
        return autoencoder_kl.param_shapes(
            autoencoder_kl.AutoencoderKLConfig.from_diffusers(config)
        )
    return clip_text.param_shapes(clip_text.CLIPTextConfig.from_transformers(config))


def write_pipeline(folder, *, xl=False, **changes):
    """Writes a pipeline; `changes` are new values in the config of the part of their name."""
    networks = {"unet": UNET_XL if xl else UNET, "vae": VAE, "text_encoder": TEXT_ENCODER}
    tokenizers = ["tokenizer"]
    if xl:
        networks["text_encoder_2"] = TEXT_ENCODER_2
        tokenizers.append("tokenizer_2")
    index = {
        "_class_name": f"StableDiffusion{'XL' if xl else ''}Pipeline",
        "_diffusers_version": "0.35.0",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
    }
    # SDXL's own index does not name it.
    index |= {} if xl else {"safety_checker": [None, None], "requires_safety_checker": False}
    for i, (name, config) in enumerate(networks.items()):
        config = config | changes.get(name, {})
        (folder / name).mkdir(parents=True)
        params = random_params(shapes(name, config), jax.random.key(i))
        write_network(folder / name, config, params)
        package = "transformers" if name.startswith("text") else "diffusers"
        index[name] = [package, config.get("_class_name", config.get("architectures", [None])[0])]
    for name in tokenizers:
        (folder / name).mkdir()
        # SDXL's second tokenizer pads as those of Stable Diffusion 2.x.
        write_tokenizer(folder / name, **({"pad": "!"} if name == "tokenizer_2" else {}))
        index[name] = ["transformers", "CLIPTokenizer"]
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder
