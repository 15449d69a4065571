"""The request and the step of a command, of a model whose weights were never read.

The request is made by the command's own functions. What these ask of the model is answered by
stand-ins: parameters of which one number is stored, and encoders that return noise of the right
shape. Encoded prompts become constants of the step; noise keeps the compiler from folding them.
"""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_unlearn import losses, sharding
from jax_unlearn.app import embedded
from jax_unlearn.app.algorithm import algorithm_of
from jax_unlearn.app.options import ConceptOptions, DataOptions, ModelOptions
from jax_unlearn.app.tasks import concept_request, images
from jax_unlearn.app.tasks.any_condition import any_condition_setup, unmeasured_points
from jax_unlearn.app.tasks.base import Setup, unmeasured
from jax_unlearn.app.tasks.concept_formulations import (
    likelihood_problem,
    reverse_kl_setup,
    unmeasured_samples,
)
from jax_unlearn.app.tasks.image_task import image_setup
from jax_unlearn.models.autoencoder_kl import AutoencoderKLConfig, Gaussian
from jax_unlearn.models.clip_text import TextEncoding
from jax_unlearn.models.files import read_json
from jax_unlearn.pretrained import Pretrained, TextToImage
from jax_unlearn.pretrained.hub import find_model
from jax_unlearn.pretrained.networks import Network
from jax_unlearn.pretrained.unet import describe_denoiser

__all__ = ["Step", "request_of", "setup_of", "step_of"]

# Of released models, where no json file says otherwise.
_TOKENS = 77
_AUTOENCODER = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128] * 4,
}


class Step(NamedTuple):
    """A step as it is compiled, and the shapes of what it is given.

    Attributes:
      function: (key, state, reference, brought) -> (state, info).
      arguments: the shapes of these.
      dual_share: the part of all steps in which fresh samples move the multipliers.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    dual_share: float


def _noise(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape, np.float32))


@dataclasses.dataclass(frozen=True)
class _TextEncoder:
    """Stands in for a text encoder."""

    hidden_size: int
    pooled_size: int

    def apply(self, variables: Any, tokens: Any, **options: Any) -> TextEncoding:
        del variables, options
        count, length = tokens.shape
        hidden = _noise(count, length, self.hidden_size)
        return TextEncoding(hidden, _noise(count, self.pooled_size))


@dataclasses.dataclass(frozen=True)
class _Autoencoder:
    """Stands in for the autoencoder."""

    config: AutoencoderKLConfig

    def apply(self, variables: Any, pixels: Any, method: str) -> Gaussian:
        del variables, method
        count, height, width, _ = pixels.shape
        sides = height // self.config.factor, width // self.config.factor
        zeros = jnp.zeros((count, *sides, self.config.latent_channels))
        return Gaussian(zeros, zeros)


class _Tokens(NamedTuple):
    ids: list[str]


class _Tokenizer(NamedTuple):
    """Stands in for a tokenizer: a token a word, and every prompt is short enough."""

    length: int

    @property
    def bpe(self) -> "_Tokenizer":
        return self

    def encode(self, prompt: str) -> _Tokens:
        return _Tokens(prompt.split())

    def __call__(self, prompts: list[str]) -> np.ndarray:
        return np.zeros((len(prompts), self.length), np.int32)


def _described(options: ModelOptions, folder: str | pathlib.Path) -> Pretrained:
    found = describe_denoiser(
        find_model(folder, options.revision or None),
        options.model,
        dtype=options.dtype,
        remat=options.remat,
        revision=options.revision or None,
    )
    params = jax.tree.map(lambda leaf: unmeasured(*leaf.shape, dtype=leaf.dtype), found.params)
    return found._replace(params=params)


def _listed(folder: pathlib.Path, part: str, file: str) -> dict[str, Any]:
    path = folder / part / file
    return read_json(path) if path.is_file() else {}


def _text_to_image(pretrained: Pretrained) -> TextToImage:
    """A pipeline around a denoiser: what encodes prompts and images is as wide as it takes."""
    folder, unet = pathlib.Path(pretrained.config.folder), pretrained.apply.config  # pyrefly: ignore
    tokens = min(
        int(_listed(folder, "text_encoder", "config.json").get("max_position_embeddings", _TOKENS)),
        int(_listed(folder, "tokenizer", "tokenizer_config.json").get("model_max_length", _TOKENS)),
    )
    widths = [unet.context_dim]
    pooled = unet.context_dim
    if unet.addition_embed_type is not None:
        # Two encoders, of which the denoiser's configuration gives the sum.
        widths = [unet.context_dim // 2, unet.context_dim - unet.context_dim // 2]
        sizes = 6 * unet.addition_time_embed_dim
        pooled = unet.projection_class_embeddings_input_dim - sizes
    vae = _listed(folder, "vae", "config.json")
    config = AutoencoderKLConfig.from_diffusers(vae or _AUTOENCODER)
    return TextToImage(
        pretrained,
        tuple(_Tokenizer(tokens) for _ in widths),  # pyrefly: ignore
        tuple(Network(_TextEncoder(width, pooled), {}, {}) for width in widths),  # pyrefly: ignore
        Network(_Autoencoder(config), {}, {}),  # pyrefly: ignore
    )


def request_of(options: ModelOptions) -> images.ImageRequest | concept_request.ConceptRequest:
    """The request that a command makes of its options, from the json files of the model.

    Images of `data` are read, for their number and labels.

    Raises:
      ValueError: as the command would, but for what only weights and tokenizers show.
    """
    folder: str | pathlib.Path = options.model
    if options.model in ("embedded", "embedded-text"):
        of_labels = options.model == "embedded"
        folder = embedded.model_path() if of_labels else embedded.text_model_path()
    pretrained = _described(options, folder)
    of_prompts = pretrained.config.text_conditional
    if isinstance(options, DataOptions):
        if of_prompts:
            return images.from_captioned(_text_to_image(pretrained), options)
        return images.from_paths(pretrained, options)
    assert isinstance(options, ConceptOptions)
    if not of_prompts:
        return concept_request.make_request(pretrained, options)
    # Edited keys and values have the shapes of the reference's.
    plain = dataclasses.replace(options, start="reference")
    return concept_request.make_prompt_request(_text_to_image(pretrained), plain)


def setup_of(
    request: images.ImageRequest | concept_request.ConceptRequest, options: ModelOptions
) -> Setup:
    """The problem and the batches of a request; numbers that a run measures are ones."""
    if isinstance(request, images.ImageRequest):
        assert isinstance(options, DataOptions)
        steps = request.pretrained.schedule.num_steps
        values = np.ones(len(request.constraints), np.float32)
        return image_setup(request, options, losses.time_weighting(np.ones(steps)), values)
    assert isinstance(options, ConceptOptions)
    if options.formulation == "reverse-kl":
        return reverse_kl_setup(request, options)
    if options.formulation == "likelihood":
        return likelihood_problem(request, options, unmeasured_samples(request, options))
    return any_condition_setup(request, options, unmeasured_points(request, options))


def step_of(options: ModelOptions, devices: int) -> Step:
    """The step that a command compiles, and the shapes of its arguments.

    Raises:
      ValueError: as `request_of`, or for batches that do not divide over the devices.
    """
    request = request_of(options)
    setup = setup_of(request, options)
    if isinstance(request, images.ImageRequest):
        start, concepts = request.pretrained.params, len(request.constraints)
    else:
        start, concepts = request.start, len(request.concepts)
    algorithm, start, step = algorithm_of(setup, options, start)
    brought = (setup.batch(0), *(() if setup.dual_batch is None else (setup.dual_batch,)))
    for leaf in jax.tree.leaves(brought):
        sharding.check_rows(len(leaf), devices)

    def begin(key: Any, params: Any) -> Any:
        return key, algorithm.init(params, jnp.ones(concepts), copy=False)

    key, state = jax.eval_shape(lambda start: begin(jax.random.key(0), start), _shapes(start))
    arguments = key, state, _shapes(request.pretrained.params), _shapes(brought)
    return Step(step, arguments, len(setup.dual_steps) / options.steps)


def _shapes(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), leaf.dtype), tree)
