"""Trains the embedded text-to-image model with torch diffusers: VAE, CLIP, then the denoiser.

The images are Fashion-MNIST's, rendered in four styles and captioned by
`jax_unlearn.app.embedded.captions`. Each stage is trained by torch, diffusers and transformers (the
`torch` extra), and the result is a genuine `StableDiffusionPipeline` of 32x32 images on 8x8
latents, with a CLIP whose text tower is the pipeline's text encoder.

    python examples/train_text_model.py vae --data FOLDER_OF_IDX_FILES --out WORK
    python examples/train_text_model.py clip --data FOLDER_OF_IDX_FILES --out WORK
    python examples/train_text_model.py denoiser --data FOLDER_OF_IDX_FILES --out WORK

The last stage writes WORK/text_model. Learning rates follow the clock (`--minutes`), or the steps
where `--steps` is given. `--without` trains an oracle of that stage: a denoiser that never saw one
object or style, on the encoders of a finished pipeline:

    python examples/train_text_model.py denoiser --data FOLDER_OF_IDX_FILES --out WORK \
        --without sneaker --encoders jax_unlearn/app/embedded/text_model --steps 6000

In the log the
first runs of the VAE and of CLIP computed in bfloat16, which proved slower on a CPU; the VAE's
decoder and CLIP's vision tower were then trained further (`--decoder`, `--vision`), and the
denoiser went on from its first weights (`--start`).
"""

import argparse
import copy
import json
import math
import pathlib
import time

import numpy as np
import tokenizers
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from train_embedded_model import read_idx, split
from transformers import CLIPConfig, CLIPModel, CLIPTextModel, CLIPTokenizer

from jax_unlearn.app.embedded.captions import (
    HELD_OUT_TEMPLATES,
    OBJECTS,
    STYLES,
    SYNONYMS,
    caption,
    captions,
    render,
)

TOKENS = 32


class Images:
    """All renderings of the training or the held-out images."""

    def __init__(self, folder: pathlib.Path, held_out: bool = False) -> None:
        pixels = read_idx(folder / "train-images-idx3-ubyte.gz")
        labels = read_idx(folder / "train-labels-idx1-ubyte.gz")
        train, others, _ = split(labels)
        chosen = others if held_out else train
        self.pixels, self.labels = pixels[chosen][..., None], labels[chosen].astype(int)

    def render(self, indices: np.ndarray, styles: np.ndarray) -> torch.Tensor:
        """[n, 3, 32, 32] in [-1, 1]."""
        drawn = np.empty((len(indices), 32, 32, 3), np.uint8)
        for number, style in enumerate(STYLES):
            (where,) = np.nonzero(styles == number)
            if len(where):
                drawn[where] = render(self.pixels[indices[where]], style)
        return torch.from_numpy(drawn.astype(np.float32) / 127.5 - 1).permute(0, 3, 1, 2)


def train(minutes, model, average, optimizer, step, report, every, decay, warmup=200, steps=None):
    """Calls step() until the time or the steps are up; the rate is warmed up, then a cosine."""
    rates = [group["lr"] for group in optimizer.param_groups]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    start, number, running = time.time(), 0, 0.0

    def gone():
        return (time.time() - start) / (60 * minutes) if steps is None else number / steps

    while (done := gone()) < 1:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = (
                rate * min(1, (number + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * done))
            )
        loss = step()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        keep = min(decay, (number + 1) / (number + 10))
        with torch.no_grad():
            for mean, value in zip(average.parameters(), model.parameters(), strict=True):
                mean.lerp_(value, 1 - keep)
        running, number = running + loss.item(), number + 1
        if number % every == 0:
            minutes_gone = (time.time() - start) / 60
            print(
                f"step {number} minutes {minutes_gone:.1f} loss {running / every:.5f} {report()}",
                flush=True,
            )
            running = 0.0
    print(f"end: step {number} {report()}", flush=True)


def train_vae(options, rng) -> None:
    images, held_out = Images(options.data), Images(options.data, held_out=True)
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=32,
    )
    if options.decoder:
        model = AutoencoderKL.from_pretrained(options.out / "vae").train()
    average = copy.deepcopy(model).eval().requires_grad_(False)
    trained = model.parameters()
    if options.decoder:
        trained = [*model.decoder.parameters(), *model.post_quant_conv.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=2e-3, betas=(0.9, 0.99), weight_decay=0)
    some = np.arange(400)
    shown = held_out.render(some, some % len(STYLES))

    def step():
        indices = rng.integers(len(images.labels), size=64)
        x = images.render(indices, rng.integers(len(STYLES), size=64))
        with torch.set_grad_enabled(not options.decoder):
            posterior = model.encode(x).latent_dist
        again = model.decode(posterior.sample()).sample
        kl = posterior.kl().mean() / x[0].numel()
        return (again - x).abs().mean() + (again - x).square().mean() + 1e-3 * kl

    def report():
        with torch.no_grad():
            latents = average.encode(shown).latent_dist.mean
            again = average.decode(latents).sample
        average.register_to_config(scaling_factor=round(float(1 / latents.std()), 5))
        average.save_pretrained(options.out / "vae")
        return (
            f"held-out: squared error {(again - shown).square().mean():.5f} "
            f"latents' std {latents.std():.3f}"
        )

    train(options.minutes or 10, model, average, optimizer, step, report, 100, decay=0.995)


def write_tokenizer(folder: pathlib.Path) -> CLIPTokenizer:
    """A byte-pair encoding learned from the captions, as CLIP's: start, end and padding tokens."""
    start, end = "<|startoftext|>", "<|endoftext|>"
    texts = [text for o in OBJECTS for s in STYLES for text in captions(o, s)]
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(
                tokenizers.Regex(r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"), "removed", invert=True
            ),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bytes_ = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=1000, initial_alphabet=bytes_, end_of_word_suffix="</w>", show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    merges = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]
    words = [*bytes_, *(b + "</w>" for b in bytes_), *("".join(merge) for merge in merges)]
    vocabulary = {word: i for i, word in enumerate([*dict.fromkeys(words), start, end])}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges), ""]
    (folder / "merges.txt").write_text("\n".join(lines))
    special = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": end}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    config = special | {"model_max_length": TOKENS, "tokenizer_class": "CLIPTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return CLIPTokenizer.from_pretrained(folder)


def tokenize(tokenizer, texts):
    options = {"padding": "max_length", "max_length": TOKENS, "return_tensors": "pt"}
    return tokenizer(texts, **options).input_ids


def train_clip(options, rng) -> None:
    images, held_out = Images(options.data), Images(options.data, held_out=True)
    tokenizer = write_tokenizer(options.out / "tokenizer")
    ends = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    tower = {
        "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3,
        "num_attention_heads": 4, "projection_dim": 64,
    }  # fmt: skip
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": TOKENS}
    vision = {"image_size": 32, "patch_size": 4}
    model = CLIPModel(
        CLIPConfig(text_config=tower | text | ends, vision_config=tower | vision, projection_dim=64)
    ).train()
    if options.vision:
        model = CLIPModel.from_pretrained(options.out / "clip").train()
    average = copy.deepcopy(model).eval().requires_grad_(False)
    trained = model.parameters()
    if options.vision:
        trained = [*model.vision_model.parameters(), *model.visual_projection.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, betas=(0.9, 0.98), weight_decay=1e-2)
    pairs = [(o, s) for o in range(len(OBJECTS)) for s in range(len(STYLES))]
    by_object = [np.nonzero(images.labels == o)[0] for o in range(len(OBJECTS))]

    def step():
        # Two images of each of the forty pairs; captions name the pair, or half of it.
        shown = np.array(pairs * 2)
        indices = np.array([rng.choice(by_object[o]) for o, _ in shown])
        texts, match = [], np.zeros((len(shown), len(shown)), np.float32)
        for row, (o, s) in enumerate(shown):
            kind = rng.random()
            name = str(rng.choice((OBJECTS[o], *SYNONYMS[OBJECTS[o]])))
            if kind < 0.7:
                texts.append(str(rng.choice(captions(OBJECTS[o], STYLES[s]))))
            else:
                texts.append(caption(name, None) if kind < 0.85 else caption(None, STYLES[s]))
            same = [shown[:, 0] == o, shown[:, 1] == s]
            match[row] = same[0] & same[1] if kind < 0.7 else same[0 if kind < 0.85 else 1]
        target = torch.from_numpy(match)
        logits = model(
            input_ids=tokenize(tokenizer, texts),
            pixel_values=images.render(indices, shown[:, 1]),
        ).logits_per_text
        by_text = (target / target.sum(1, keepdim=True)) * logits.log_softmax(1)
        by_image = (target / target.sum(0, keepdim=True).clamp(min=1)) * logits.log_softmax(0)
        return -(by_text.sum() + by_image.sum()) / (2 * len(shown))

    some = np.arange(600)

    def report():
        rates = []
        shown = held_out.render(some, some % len(STYLES))
        for template in (None, *HELD_OUT_TEMPLATES):
            options_ = {} if template is None else {"template": template}
            texts = [caption(OBJECTS[o], STYLES[s], **options_) for o, s in pairs]
            with torch.no_grad():
                logits = average(
                    input_ids=tokenize(tokenizer, texts), pixel_values=shown
                ).logits_per_image
            found = np.array(pairs)[logits.argmax(1).numpy()]
            rates.append((found[:, 0] == held_out.labels[some]).mean())
            rates.append((found[:, 1] == some % len(STYLES)).mean())
        average.save_pretrained(options.out / "clip")
        return "held-out object, style by template: " + " ".join(f"{rate:.3f}" for rate in rates)

    train(options.minutes or 8, model, average, optimizer, step, report, 100, decay=0.995)


def train_denoiser(options, rng) -> None:
    images, held_out = Images(options.data), Images(options.data, held_out=True)
    parts, clip = (options.out, "clip")
    if options.encoders:
        parts, clip = options.encoders, "text_encoder"
    vae = AutoencoderKL.from_pretrained(parts / "vae", torch_dtype=torch.float32)
    vae = vae.eval().requires_grad_(False)
    tokenizer = CLIPTokenizer.from_pretrained(parts / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(parts / clip, dtype=torch.float32).eval()
    for source in (images, held_out):  # An oracle of an object has seen no image of it.
        lost = OBJECTS.index(options.without) if options.without in OBJECTS else None
        seen = source.labels != lost
        source.pixels, source.labels = source.pixels[seen], source.labels[seen]
    shown_styles = [s for s, style in enumerate(STYLES) if style != options.without]

    def latents_of(images):
        parts = []
        for style in range(len(STYLES)):
            for part in np.array_split(np.arange(len(images.labels)), len(images.labels) // 250):
                with torch.no_grad():
                    drawn = images.render(part, np.full(len(part), style))
                    mean = vae.encode(drawn).latent_dist.mean
                parts.append(mean * vae.config.scaling_factor)
        return torch.cat(parts).reshape(len(STYLES), len(images.labels), *parts[0].shape[1:])

    start = time.time()
    latents, others = latents_of(images), latents_of(held_out)
    print(f"encoded in {(time.time() - start) / 60:.1f} minutes", flush=True)

    texts = [""]
    full, objects, styles = {}, {}, {}
    for o, name in enumerate(OBJECTS):
        objects[o] = [len(texts) + i for i in range(1 + len(SYNONYMS[name]))]
        texts += [caption(one, None) for one in (name, *SYNONYMS[name])]
        for s, style in enumerate(STYLES):
            many = captions(name, style)
            full[o, s] = [len(texts) + i for i in range(len(many))]
            texts += many
    for s, style in enumerate(STYLES):
        styles[s] = [len(texts)]
        texts.append(caption(None, style))
    with torch.no_grad():
        table = encoder(tokenize(tokenizer, texts)).last_hidden_state

    model = UNet2DConditionModel(
        sample_size=8,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(48, 96),
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=4,
        norm_num_groups=16,
    )
    if options.start:
        model = UNet2DConditionModel.from_pretrained(options.start, subfolder="unet").train()
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{count} parameters, {len(texts)} captions", flush=True)
    average = copy.deepcopy(model).eval().requires_grad_(False)
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=False, steps_offset=1,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=options.learning_rate, betas=(0.9, 0.99), weight_decay=1e-3
    )

    def choose(o, s, rng):
        kind = rng.random()
        if kind < 0.1:
            return 0
        pool = objects[o] if kind < 0.18 else styles[s] if kind < 0.26 else full[o, s]
        return rng.choice(pool)

    def loss_of(model, source, labels, size, rng):
        indices, chosen = rng.integers(len(labels), size=size), rng.choice(shown_styles, size)
        rows = [choose(labels[i], s, rng) for i, s in zip(indices, chosen, strict=True)]
        x = source[chosen, indices]
        noise = torch.from_numpy(rng.standard_normal(x.shape, np.float32))
        t = torch.from_numpy(rng.integers(1000, size=size))
        found = model(scheduler.add_noise(x, noise, t), t, table[rows]).sample
        return (found - noise).square().mean()

    def save() -> None:
        pipeline = StableDiffusionPipeline(
            vae=copy.deepcopy(vae).half(),
            text_encoder=encoder,
            tokenizer=tokenizer,
            unet=copy.deepcopy(average).half(),
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.save_pretrained(options.out / "text_model")

    def report():
        save()
        fixed = np.random.default_rng(1)
        with torch.no_grad():
            losses = [
                float(loss_of(average, others, held_out.labels, 250, fixed)) for _ in range(8)
            ]
        return f"held-out {np.mean(losses):.5f}"

    train(
        options.minutes or 60,
        model,
        average,
        optimizer,
        lambda: loss_of(model, latents, images.labels, options.batch_size, rng),
        report,
        500,
        decay=0.999,
        warmup=300,
        steps=options.steps,
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("stage", choices=("vae", "clip", "denoiser"))
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--steps", type=int, help="of the denoiser, whatever the time")
    parser.add_argument("--without", choices=(*OBJECTS, *STYLES), help="what no image may show")
    parser.add_argument("--encoders", type=pathlib.Path, help="a pipeline, for its other parts")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--decoder", action="store_true", help="train the VAE's decoder further")
    parser.add_argument("--vision", action="store_true", help="train CLIP's vision tower further")
    parser.add_argument("--start", type=pathlib.Path, help="go on from this denoiser's weights")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    stages = {"vae": train_vae, "clip": train_clip, "denoiser": train_denoiser}
    stages[options.stage](options, np.random.default_rng(options.seed))


if __name__ == "__main__":
    main()
