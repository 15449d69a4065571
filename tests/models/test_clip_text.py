import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from clip_vocabulary import END, VOCABULARY, write_tokenizer
from parity import TOLERANCE, assert_near, relative_error

from jax_unlearn.models.clip_text import CLIPTextConfig, CLIPTextModel, param_shapes
from jax_unlearn.pretrained.clip_tokenizer import load_tokenizer
from jax_unlearn.pretrained.networks import load_network

FOLDER = pathlib.Path(__file__).parents[1] / "fixtures" / "stable_diffusion"


@pytest.fixture(scope="module", params=["text_encoder", "text_encoder_2"])
def encoder(request):
    folder = FOLDER / request.param
    return load_network(folder), dict(np.load(folder / "expected.npz"))


def outputs(network, tokens):
    def encode(**options):
        return network.module.apply({"params": network.params}, tokens, **options)

    hidden, pooled = encode()
    return {
        "last": hidden,
        "pooled": pooled,
        "penultimate": encode(skip=1, final_norm=False).hidden_states,
        "skip_1_normed": encode(skip=1).hidden_states,
        "skip_2": encode(skip=2, final_norm=False).hidden_states,
    }


def test_output_equals_torch(encoder):
    network, given = encoder
    assert_near(outputs(network, given["tokens"]), given)
    projects = network.module.config.with_projection
    assert given["pooled"].shape == (2, 6 if projects else 8)


def test_pooled_state_is_that_of_the_last_layer(encoder):
    network, given = encoder
    skipped = network.module.apply(
        {"params": network.params}, given["tokens"], skip=2, final_norm=False
    )
    assert relative_error(skipped.pooled, given["pooled"]) < TOLERANCE


def test_end_of_a_prompt():
    network = load_network(FOLDER / "text_encoder")
    given = np.load(FOLDER / "text_encoder" / "expected.npz")
    # 2 is a token of the first prompt too: it means the highest token, here 39 at 4 and 2.
    for end, positions in ((2, [4, 2]), (39, [4, 2]), (17, [3, 0])):
        config = CLIPTextConfig.from_transformers(network.config | {"eos_token_id": end})
        variables = {"params": network.params}
        hidden, pooled = CLIPTextModel(config).apply(variables, given["tokens"])
        np.testing.assert_allclose(pooled, hidden[jnp.arange(2), jnp.array(positions)], atol=1e-6)


def test_later_tokens_change_no_earlier_state(encoder):
    network, given = encoder
    tokens = given["tokens"].copy()
    tokens[:, 4] = 7
    actual = outputs(network, tokens)["last"]
    np.testing.assert_allclose(actual[:, :4], given["last"][:, :4], rtol=1e-4, atol=1e-5)
    assert relative_error(actual[:, 4:], given["last"][:, 4:]) > 1e-2


@pytest.mark.slow
def test_bfloat16_computes_close_and_keeps_float32_outside(encoder):
    network, given = encoder
    network = network._replace(module=CLIPTextModel(network.module.config, dtype=jnp.bfloat16))
    for name, values in outputs(network, given["tokens"]).items():
        assert values.dtype == jnp.float32
        assert 1e-4 < relative_error(values, given[name]) < 0.1


def test_wrong_arguments_are_refused(encoder):
    network, given = encoder
    variables, tokens = {"params": network.params}, given["tokens"]
    outside = network.module.apply(variables, np.where(tokens == 17, 40, tokens)).hidden_states
    assert np.isnan(outside[0]).all()
    assert np.isfinite(outside[1]).all()
    with pytest.raises(ValueError, match=r"\[batch, at most 10\], not \(2, 11\)"):
        network.module.apply(variables, np.zeros((2, 11), np.int32))
    with pytest.raises(ValueError, match=r"at most 10\], not \(7,\)"):
        network.module.apply(variables, tokens[0])
    with pytest.raises(ValueError, match="must be integers"):
        network.module.apply(variables, tokens.astype(np.float32))
    with pytest.raises(ValueError, match="from 0 to the 3 layers, not 4"):
        network.module.apply(variables, tokens, skip=4)


FULL = {
    "stable-diffusion-v1-5": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_attention_heads": 12,
        "projection_dim": 768,
        "eos_token_id": 2,
    },
    "stable-diffusion-2-1": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 23,
        "num_attention_heads": 16,
        "hidden_act": "gelu",
        "eos_token_id": 2,
    },
    "stable-diffusion-xl-base-1.0": {
        "architectures": ["CLIPTextModelWithProjection"],
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "projection_dim": 1280,
        "hidden_act": "gelu",
        "eos_token_id": 2,
    },
}


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("stable-diffusion-v1-5", 123_060_480),
        ("stable-diffusion-2-1", 340_387_840),
        ("stable-diffusion-xl-base-1.0", 694_659_840),
    ],
)
def test_number_of_parameters_at_full_size(name, count):
    # torch's, see test_published_networks_have_as_many_in_torch.
    shapes = param_shapes(CLIPTextConfig.from_transformers(FULL[name]))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_magic": 1}, r"unknown CLIPTextModel options \['use_magic'\]"),
        ({"hidden_act": "relu"}, "hidden_act 'relu' is not supported"),
        ({"num_attention_heads": 7}, "num_attention_heads 7 does not divide hidden_size 512"),
        ({"hidden_size": None}, "hidden_size is malformed"),
        ({"eos_token_id": [1, 2]}, "eos_token_id is malformed"),
        ({"layer_norm_eps": "small"}, "layer_norm_eps is malformed"),
    ],
)
def test_unsupported_config_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        CLIPTextConfig.from_transformers(options)


@pytest.mark.torch
def test_defaults_are_those_of_transformers(torch_side):
    config = CLIPTextConfig()
    expected = torch_side.CLIPTextConfig()
    for name in set(vars(config)) - {"with_projection"}:
        assert getattr(config, name) == getattr(expected, name)


@pytest.mark.torch
@pytest.mark.parametrize("with_projection", [False, True])
@pytest.mark.parametrize("options", [{"eos_token_id": 39}, {"hidden_act": "gelu"}])
def test_live_torch(options, with_projection, torch_side, tmp_path):
    config = torch_side.TEXT_ENCODER | options
    model = torch_side.torch_text_encoder(config, seed=11, with_projection=with_projection)
    model.save_pretrained(tmp_path)
    expected = torch_side.text_outputs(model, torch_side.TOKENS)
    assert_near(outputs(load_network(tmp_path), torch_side.TOKENS), expected)


@pytest.mark.torch
@pytest.mark.parametrize("name", FULL)
def test_published_networks_have_as_many_in_torch(name, torch_side):
    import torch

    config = {key: value for key, value in FULL[name].items() if key != "architectures"}
    with torch.device("meta"):
        if "architectures" in FULL[name]:
            network = torch_side.CLIPTextModelWithProjection
        else:
            network = torch_side.CLIPTextModel
        model = network(torch_side.CLIPTextConfig(**config))
    shapes = param_shapes(CLIPTextConfig.from_transformers(FULL[name]))
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert count == sum(values.numel() for values in model.parameters())


@pytest.fixture
def encoders(torch_side, tmp_path):
    """Two tokenizers and text encoders in torch and here, of the vocabulary of their test."""
    import transformers

    def make(name, pad, **options):
        folder = tmp_path / name
        folder.mkdir()
        write_tokenizer(folder, pad, model_max_length=10)
        config = torch_side.TEXT_ENCODER | {"vocab_size": len(VOCABULARY)} | options
        model = torch_side.torch_text_encoder(config, with_projection=name == "second")
        model.save_pretrained(folder / "model")
        theirs = transformers.CLIPTokenizer.from_pretrained(folder), model
        return theirs, (load_tokenizer(folder), load_network(folder / "model"))

    return make("first", END), make("second", "!", hidden_act="gelu")


def encode(ours, prompts, **options):
    tokenizer, network = ours
    return network.module.apply({"params": network.params}, tokenizer(prompts), **options)


PROMPTS = ["a cat!", "The dog and the cat"]


@pytest.mark.torch
def test_prompts_are_encoded_as_by_the_pipeline_of_stable_diffusion(encoders):
    import diffusers

    for (tokenizer, model), ours in encoders:
        model = getattr(model, "text_model", model)
        # With `clip_skip` the pipeline looks for the final norm where old transformers had it.
        model.__dict__["text_model"] = model
        pipeline = diffusers.StableDiffusionPipeline(
            *(None, model, tokenizer, None),
            scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        for skip in (0, 1):
            expected, _ = pipeline.encode_prompt(
                PROMPTS, "cpu", 1, do_classifier_free_guidance=False, clip_skip=skip or None
            )
            actual = encode(ours, PROMPTS, skip=skip).hidden_states
            assert relative_error(actual, expected.detach().numpy()) < TOLERANCE


@pytest.mark.torch
def test_prompts_are_encoded_as_by_the_pipeline_of_sdxl(encoders):
    import diffusers

    (theirs, first), (theirs_2, second) = encoders
    pipeline = diffusers.StableDiffusionXLPipeline(
        *(None, theirs[1], theirs_2[1], theirs[0], theirs_2[0], None),
        scheduler=diffusers.DDIMScheduler(),
        add_watermarker=False,
    )
    for clip_skip in (0, 1):
        expected, _, pooled, _ = pipeline.encode_prompt(
            PROMPTS, device="cpu", do_classifier_free_guidance=False, clip_skip=clip_skip or None
        )
        options = {"skip": 1 + clip_skip, "final_norm": False}
        encodings = [encode(ours, PROMPTS, **options) for ours in (first, second)]
        hidden = np.concatenate([encoding.hidden_states for encoding in encodings], axis=-1)
        assert relative_error(hidden, expected.detach().numpy()) < TOLERANCE
        assert relative_error(encodings[1].pooled, pooled.detach().numpy()) < TOLERANCE
