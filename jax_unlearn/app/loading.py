"""The models, images and prompts that the options of a run name."""

import dataclasses
from typing import TYPE_CHECKING, Any

# What loads networks is imported once it is asked for.
if TYPE_CHECKING:
    from jax_unlearn.app.options import ModelOptions, RunOptions

__all__ = ["announce", "load"]


def load(options: "RunOptions") -> tuple[Any, "RunOptions", Any]:
    """The request that the options ask for, the options made exact, and the judge."""
    import numpy as np

    from jax_unlearn.app import embedded
    from jax_unlearn.app.options import ConceptOptions, DataOptions, DemoOptions, ModelOptions
    from jax_unlearn.app.tasks import concept_request, images
    from jax_unlearn.models.judge import load_judge
    from jax_unlearn.pretrained import load_pretrained
    from jax_unlearn.pretrained.text_to_image import is_text_to_image

    announce(options)

    if isinstance(options, DemoOptions):
        pretrained = _named(load_pretrained(embedded.model_path()), "the embedded model")
        return (*images.from_embedded(pretrained, options), embedded.judge())
    assert isinstance(options, ModelOptions)
    own = options.model == "embedded"
    revision = options.revision or None
    if options.model == "embedded-text" or (
        not own and is_text_to_image(options.model, revision=revision)
    ):
        return _load_prompts(options)
    pretrained = load_pretrained(
        embedded.model_path() if own else options.model,
        dtype=options.dtype,
        remat=options.remat,
        revision=revision,
    )
    judge = embedded.judge() if own else None
    if own:
        pretrained = _named(pretrained, "the embedded model")
    if options.judge is not None:
        judge = load_judge(options.judge)
    if isinstance(options, DataOptions):
        return images.from_paths(pretrained, options), options, judge
    assert isinstance(options, ConceptOptions)
    request = concept_request.make_request(pretrained, options)
    if own:
        stored = embedded.load_data().held_out
        real = stored.pixels[~np.isin(stored.labels, request.forgotten)]
        request = request._replace(real=real)
    return request, options, judge


def announce(options: Any) -> None:
    """Says that a model is asked for on the hub, or converted, before it is."""
    from jax_unlearn.app.terminal import say
    from jax_unlearn.pretrained.hub import MAXDIFFUSION, is_hub_name

    model = getattr(options, "model", "embedded")
    if model not in ("embedded", "embedded-text") and is_hub_name(model):
        at = f" at {options.revision}" if options.revision else ""
        say(f"{model} is no folder here: asking the Hugging Face hub for it{at} ...")
    if model.startswith(MAXDIFFUSION):
        say(f"{model}: converted at its first use, into the user's cache ...")


def _named(pretrained: Any, name: str) -> Any:
    config = dataclasses.replace(pretrained.config, name=name)
    return pretrained._replace(config=config)


def _load_prompts(options: "ModelOptions") -> tuple[Any, "RunOptions", Any]:
    """`load` for a model from text to image."""
    from jax_unlearn.app import embedded
    from jax_unlearn.app.options import ConceptOptions, DataOptions
    from jax_unlearn.app.tasks import concept_request, images
    from jax_unlearn.pretrained.clip import load_clip, zero_shot
    from jax_unlearn.pretrained.text_to_image import load_text_to_image

    own = options.model == "embedded-text"
    path = embedded.text_model_path() if own else options.model
    model = load_text_to_image(
        path, dtype=options.dtype, remat=options.remat, revision=options.revision or None
    )
    if own:
        named = _named(model.pretrained, "the embedded model from text to image")
        model = model._replace(pretrained=named)
    folder = embedded.clip_path() if own and options.clip is None else options.clip
    clip = None if folder is None else load_clip(folder)
    if isinstance(options, DataOptions):
        request: Any = images.from_captioned(model, options)
    else:
        assert isinstance(options, ConceptOptions)
        request = concept_request.make_prompt_request(model, options)
    # Images without captions are shown under no prompt alone; a CLIP then only compares.
    classes = request.conditions.classes or ("",)
    return request, options, None if clip is None else zero_shot(clip, classes)
