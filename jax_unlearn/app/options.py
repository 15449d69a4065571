"""The options of each command: one frozen dataclass each, saved with the run as run.json."""

import dataclasses
import pathlib
import re
from collections.abc import Sequence
from typing import Annotated, Literal, NamedTuple

import tyro

from jax_unlearn import sharding
from jax_unlearn.app import methods
from jax_unlearn.app.checks import check_numbers, check_texts, check_thresholds, flag
from jax_unlearn.app.push import check_push
from jax_unlearn.app.tensorboard import check_tensorboard
from jax_unlearn.pretrained.subsets import parse_subset

__all__ = [
    "ConceptOptions",
    "DataOptions",
    "DemoOptions",
    "ImageOptions",
    "ModelOptions",
    "RunOptions",
    "SampleOptions",
    "Training",
    "VerifyOptions",
]


class Training(NamedTuple):
    """What trains, what is saved, and how many primal steps a step has."""

    train: str = "full"
    save: str = "pipeline"
    link: bool = False
    minibatches: int = 1


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """What every unlearning run can be told."""

    out: pathlib.Path = pathlib.Path("unlearned")
    """Folder for the results; refused if it exists, unless --resume or --overwrite."""
    resume: bool = False
    """Go on from the last whole checkpoint in --out, with the options saved there; refused where
    options, images or model are not those of the run."""
    go_on: Annotated[bool, tyro.conf.arg(name="continue")] = False
    """As --resume, with other --steps, thresholds, learning rates or multiplier bound from there
    on, or other versions of the libraries. The report lists each such leg of the run."""
    overwrite: bool = False
    """Move an existing --out aside (to OUT.previous-N) and start anew."""
    steps: int = 100
    """Primal-dual steps."""
    batch_size: int = 64
    """Retained images a step."""
    forget_batch_size: int = 32
    """Images to forget a step, spread evenly over the constraints."""
    accumulate: int = 1
    """Parts that each batch is taken in, one after the other: 1/N of the memory for activations, a
    third more time."""
    learning_rate: float = 5e-4
    """Adam's step size for the parameters, after a short warm-up; it falls to 0 as a cosine."""
    dual_learning_rate: float = 0.02
    """Ascent rate of the multipliers' sum, for violations relative to the reference's values."""
    dual_damping: float = 0.2
    """Proportional gain of the multipliers' PI controller, on the same scale; 0 is plain ascent."""
    max_multiplier: float = 0.9
    """Bound on the sum of the multipliers' sizes, inside (0, 1): at 1 the problem is unbounded. A
    sum that stays at its bound means that the constraints cannot be met at that price."""
    evaluation_images: int = 384
    """Images (or draws, or trajectories) that each reported estimate is made from."""
    samples: int = 32
    """Samples drawn for each label before and after; 0 draws none and skips their metrics."""
    sampling_steps: int = 25
    """DDIM steps of a sample, 1 to the number of training steps."""
    guidance: float = 2.5
    """Classifier-free guidance scale of the samples: 1 is none, 0 the null label alone."""
    checkpoint_every: int = 50
    """Steps between checkpoints."""
    seed: int = 0
    """Seed of everything random, 0 to 4294967295."""
    tensorboard: bool = False
    """Write the metrics to OUT/tensorboard too, as events of TensorBoard; needs tensorboardX."""
    push_to_hub: str = ""
    """NAME or OWNER/NAME on the Hugging Face hub that OUT/model is uploaded to once the report is
    complete. A new repository is private. Not saved: give it again with --resume."""
    mesh: str = ""
    """How devices are used, as data=4,fsdp=2,tensor=1: batches are split over data and fsdp,
    parameters over fsdp and tensor; -1 is what is left. Default: all for data. Not saved."""
    parallel: Literal["jit", "pmap"] = "jit"
    """How the step is spread over devices; pmap is over data alone, on one machine. Not saved."""
    coordinator: str = ""
    """HOST:PORT of process 0 of a run by many processes, or auto on TPU pods and under SLURM,
    Kubernetes or MPI. Each process is given the same command, and sees --out. Not saved."""
    num_processes: int = 0
    """How many processes the run has, where --coordinator is not auto."""
    process_id: int = -1
    """The number of this process, from 0, where --coordinator is not auto."""

    @property
    def training(self) -> Training:
        """How the parameters train and are saved, where the command has no options for it."""
        return Training()

    def validate(self) -> None:
        """Checks every number against its domain, and that what is asked for can be written.

        Raises:
          ValueError: naming the option, what was given and what is allowed.
        """
        check_numbers(self)
        if self.tensorboard:
            check_tensorboard()
        if self.push_to_hub:
            check_push(self.push_to_hub)
        self._check_devices()

    def _check_devices(self) -> None:
        many = self.num_processes, self.process_id
        if not self.coordinator or self.coordinator == "auto":
            if many != (0, -1):
                raise ValueError(
                    "--num-processes and --process-id come with --coordinator HOST:PORT."
                )
        elif not re.fullmatch(r"\S+:\d{1,5}", self.coordinator):
            raise ValueError(f"--coordinator must be HOST:PORT, or auto, not {self.coordinator!r}.")
        elif not 0 <= self.process_id < self.num_processes:
            raise ValueError(
                f"--process-id {self.process_id} of --num-processes {self.num_processes}: give "
                "the number of processes, and a number from 0 below it for each."
            )
        if self.parallel == "pmap" and (self.mesh or self.coordinator):
            raise ValueError("--parallel pmap has no --mesh and no --coordinator: take jit.")
        sharding.parse_mesh(self.mesh)


@dataclasses.dataclass(frozen=True)
class ImageOptions(RunOptions):
    """What every run that forgets images can be told."""

    per_image: bool = False
    """Make each image to forget a constraint of its own, with its own multiplier. Single images
    want --weighting nelbo, a lower --learning-rate (1e-4) and more --steps (300)."""
    threshold: tuple[str, ...] = ("calibrated",)
    """What each constraint's denoising loss must reach: a number (in the loss's unit), "2x" (that
    many times the reference model's own value) or "calibrated" (as likely as held-out retained
    images, and no less). One for all, or one for each --forget."""
    weighting: Literal["simple", "nelbo"] = "simple"
    """Unit of objective and constraints: "simple" is the mean squared error of the noise, a
    dimension and time step; "nelbo" is the negative ELBO (path KL) in nats an image."""
    estimator: Literal["two_term", "importance"] = "two_term"
    """"importance": forgotten and kept images share noisy ones; see jax_unlearn.forward_kl."""
    base_share: float = 0.5
    """Share of --batch-size shown under conditions that must become the law of the retained images
    (the null label and forgotten labels) when whole labels are forgotten; in [0, 1]."""
    null_share: float = 0.5
    """Share of images shown under the null label, where the model has one; in [0, 1]."""
    held_out_share: float = 0.2
    """Share of the retained images held out, to calibrate and judge on, never trained on."""


@dataclasses.dataclass(frozen=True)
class DemoOptions(ImageOptions):
    """Forgets a class, or repeated images, or with --text prompts, of the embedded models."""

    text: bool = False
    """Forget prompts of the embedded model from text to image, by reverse KL and likelihood."""
    robust: bool = False
    """With --text: forget under any condition, against attackers that train beside the model:
    `concept --formulation without`."""
    forget: tuple[str, ...] = ()
    """Labels to forget, by name or number, each one constraint, default Trouser; or "repeated", the
    sixteen images that the embedded model's training set repeats, each of them a constraint. With
    --text objects or styles, default sneaker."""
    evaluation_images: int = 192
    """Images (or draws, or trajectories) that each reported estimate is made from."""
    samples: int = 16
    """Samples drawn for each label before and after; 0 draws none and skips their metrics."""
    sampling_steps: int = 20
    """DDIM steps of a sample, 1 to the number of training steps."""
    formulation: Literal["all", "forward-kl", "reverse-kl", "likelihood"] = "all"
    """Which runs to make, each in a folder of its own if "all". The options here are forward KL's;
    the others take of them seed, guidance, and (but for --text) samples: see `concept --help`."""

    @property
    def asked(self) -> tuple[str, ...]:
        """What to forget, the defaults filled in."""
        return self.forget or (("sneaker",) if self.text else ("Trouser",))

    def validate(self) -> None:
        """Checks every number, and the thresholds."""
        super().validate()
        check_texts(self, ("forget",))
        check_thresholds(self.threshold, self.asked)
        if self.robust and (not self.text or self.formulation != "all"):
            raise ValueError("--robust is for --text, and a --formulation of its own.")
        if self.text and self.formulation == "forward-kl":
            raise ValueError("--text forgets prompts: that is reverse KL, likelihood, or all.")
        if "repeated" in self.forget and self.formulation not in ("all", "forward-kl"):
            raise ValueError("--forget repeated forgets images: that is --formulation forward-kl.")


@dataclasses.dataclass(frozen=True)
class ModelOptions(RunOptions):
    """What a run on a diffusers checkpoint of the user's can be told of it."""

    model: str = ""
    """Pipeline folder (model_index.json), model folder (config.json) or name on the hub;
    maxdiffusion:FOLDER for a Stable Diffusion that maxdiffusion saved, at its latest step;
    "embedded" is the embedded model of labels, "embedded-text" that of prompts."""
    revision: str = ""
    """Models on the hub: branch, tag or commit; the report names the commit that was loaded."""
    clip: pathlib.Path | None = None
    """Models of prompts: folder of a CLIP (transformers' CLIPModel, with its tokenizer), which
    names what samples show among the run's prompts."""
    judge: pathlib.Path | None = None
    """Models of labels: folder of a classifier (judge.json, judge.safetensors) that names what
    samples show."""
    strength: float | None = None
    """The one weight of a --method that is a baseline; what it weighs, and its default, is in the
    table of methods: docs/methods.md."""
    train: str = "full"
    """What trains: full, cross-attention, cross-attention-kv, no-cross-attention (ESD's esd-x,
    esd-x-strict, esd-u), or lora:RANK, or lora:RANK:SUBSET. Models of labels train in full."""
    save: Literal["pipeline", "unet", "lora", "maxdiffusion"] = "pipeline"
    """What OUT/model is: the whole pipeline, the UNet alone, or, of --train lora:RANK, the change
    that diffusers' load_lora_weights reads; or the pipeline as a checkpoint of maxdiffusion's."""
    link: bool = False
    """Link the files of the pipeline's unchanged parts (hard links) instead of copying them."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the denoiser computes in; parameters are float32."""
    remat: bool = False
    """Compute the denoiser's blocks again in backward passes instead of storing what they found:
    a third more time, and a fraction of the memory."""

    @property
    def training(self) -> Training:
        """As the options say."""
        return Training(self.train, self.save, self.link)

    def validate(self) -> None:
        """Checks what trains and what is saved, the method, and every number."""
        super().validate()
        methods.check(self)
        if parse_subset(self.train).rank is None and self.save == "lora":
            raise ValueError("--save lora needs --train lora:RANK.")

    def refuse(self, names: Sequence[str], why: str) -> None:
        """Refuses options of another kind of model, where one is not at its default.

        Raises:
          ValueError: naming the option, and why.
        """
        for name in names:
            if getattr(self, name) != getattr(type(self), name):
                raise ValueError(f"--{name} is for {why}.")


@dataclasses.dataclass(frozen=True)
class DataOptions(ImageOptions, ModelOptions):
    """Forgets images that a diffusers checkpoint was trained on.

    Models from text to image see images under their captions: that written as PATH:CAPTION, or the
    text in a .txt file of the same name beside each image, or else no prompt.
    """

    method: Literal[
        "constrained", "naive-deletion", "neg-grad", "siss", "siss-no-is", "erase-diff",
        "saliency", "selective-amnesia", "equal-weights",
    ] = "constrained"  # fmt: skip
    """"constrained", or a baseline that --strength weighs: it trains by its own loss on the same
    images, and is measured by the same constraints, which it does not see."""
    forget: tuple[str, ...] = ()
    """Images to forget, each one constraint: a folder, an image, an .npz or an idx file; PATH:LABEL
    gives or selects the label, PATH:CAPTION gives the caption."""
    retain: tuple[str, ...] = ()
    """Images to retain, in the same forms."""
    held_out: tuple[str, ...] = ()
    """Retained images that the model was not trained on; default: a share of --retain."""
    resize: bool = False
    """Crop and resize images, and convert their channels, to what the model takes."""

    def validate(self) -> None:
        """Checks that the job is complete, and every number."""
        super().validate()
        for name in ("model", "forget", "retain"):
            if not getattr(self, name):
                raise ValueError(f"--{name} is missing: see jax-unlearn data --help.")
        check_thresholds(self.threshold, self.forget)


@dataclasses.dataclass(frozen=True)
class ConceptOptions(ModelOptions):
    """Forgets concepts that a diffusers checkpoint is conditioned on: labels or prompts; no images.

    The trained model p is conditioned on what is forgotten: a label c, or each prompt c that the
    concept's names make of the templates. There it is held to the reference's law of a base,
    q(·|base), and must not show any of the forgotten concepts; every other label, and for prompts
    those of --retain and no prompt at all, is held to what it was.
    """

    model: str = "embedded"
    method: Literal[
        "constrained", "esd", "concept-ablation", "uce", "neg-grad", "adv-unlearn",
        "selective-amnesia", "equal-weights",
    ] = "constrained"  # fmt: skip
    """"constrained", or a baseline that --strength weighs: it trains by its own loss, from the
    reference, and is measured by the constraints of --formulation, which it does not see."""
    forget: tuple[str, ...] = ()
    """Concepts to forget, each one constraint: labels, by name or number; or for prompts a name, or
    several that mean the same: "sneaker|trainer"."""
    template: tuple[str, ...] = ("{}",)
    """Prompts: what names are put into, in place of {}; each template widens every concept.
    "a photo of a {} => a photo" also says which prompt, without the concept, it is held to."""
    formulation: Literal["reverse-kl", "likelihood", "without"] = "reverse-kl"
    """"reverse-kl": min KL(p‖q) subject to KL(p‖q(·|c)) ≥ b, path KLs along the model's own
    trajectories. "likelihood": min KL(p‖q) subject to E_p[h_c] ≤ ε, h = (f − e)(S − e)⁻¹ the
    calibrated posterior: f is that of the reference's own diffusion classifier, S and e what it
    finds on average in stored samples with and without each concept. E_p[h_c] is then the share of
    samples that show c. With --target-steps 0, h_c is f_c itself, among all labels or prompts.
    "without": min E‖ε_p − ε_q‖²/d over what is kept, subject to E g‖ε_p(x_t, e) − ε̄_c(x_t)‖²/d ≤ τ
    over noised samples of c, under conditions e that attackers find while the model trains. ε̄_c
    is what the kept conditions alone predict there; g is 1 where p denoises c better, else 0."""
    base: str | None = None
    """What is held to instead of a concept: a label, or (default) the null label; for prompts a
    name put into the templates, or (default) no prompt. A template's own base goes first."""
    anchor: str | None = None
    """Label that "calibrated" thresholds are measured on, default the mean of the kept labels; or,
    for prompts, a name put into the templates, which is then kept too."""
    retain: tuple[str, ...] = ()
    """Prompts to keep, or @FILE with one a line; all conditions to keep count the same."""
    show: tuple[str, ...] = ()
    """Prompts that are drawn and measured but not trained on, or @FILE; paraphrases, say."""
    threshold: tuple[str, ...] = ("calibrated",)
    """A number (nats; for likelihoods a share), "1.2x" (that many times the value that --base
    itself has) or "calibrated" (as far from c, or as unlikely to be c, as samples of --anchor; n
    samples do not show a probability below 1/(n + 2)). "without" takes "0.05x" by default, a
    twentieth of the reference's own value under attack, and is never calibrated."""
    separate_null: bool = False
    """Separate the null label, or no prompt, from the concepts too: it also generates them."""
    start: Literal["edited", "reference"] | None = None
    """Prompts: start from "edited" keys and values of cross-attention, which see the base in place
    of what is forgotten, or from the "reference". Default: edited, where --train trains them."""
    estimator: Literal["bounded", "pathwise", "stop_gradient"] = "bounded"
    """"reverse-kl": how far gradients go through the sampler; see jax_unlearn.reverse_kl."""
    minibatches: int = 1
    """"reverse-kl": primal steps on each sampled trajectory, each on as many of its points, at the
    price of one step on all; the multipliers take one. A divisor of --chain-steps; more than 1
    needs --estimator stop_gradient."""
    steps: int = 60
    """Primal-dual steps; the command line takes 300 of "likelihood", which are cheaper."""
    batch_size: int = 24
    """Kept conditions a step."""
    forget_batch_size: int = 12
    """Forgotten conditions a step. Their part of all rows is their weight in the objective."""
    learning_rate: float = 1e-4
    """Adam's step size for the parameters, after a short warm-up; it falls to 0 as a cosine."""
    dual_learning_rate: float = 0.2
    """"reverse-kl": ascent rate of the multipliers, for violations relative to the thresholds."""
    dual_damping: float = 0.5
    """"reverse-kl": proportional gain of the multipliers' PI controller, on the same scale."""
    chain_steps: int = 10
    """Steps of the model's own ancestral sampler, along which it is trained ("reverse-kl") and path
    KLs are measured; few steps overstate them, thresholds and values alike."""
    stored_samples: int = 512
    """"likelihood", "without": samples of the reference that are drawn once and trained on, of
    --base (or the concepts) and of what is kept each."""
    target_steps: int = 10
    """"likelihood": noise levels of each stored sample at which the optimum's own score is computed
    beforehand, from the reference's predictions at all concepts, for the training to regress on, 2
    or more; 0 trains on the samples themselves, weighted, which is cheaper to set up and forgets
    less for more."""
    corrections: int = 3
    """"likelihood": how often, at equal distances up to the middle of the run, fresh samples of the
    model itself move the multipliers, --stored-samples each time; constraints are then to hold by
    a standard error."""
    attack_steps: int = 400
    """"without": steps of each attacker, whose places are taken by new ones then."""
    classifier_draws: int = 8
    """"likelihood": draws of noise for each image that h_c is estimated from, 2 or more."""
    classifier_noise: float = 0.7
    """"likelihood": h_c is the posterior at the image with noise of this standard deviation (that
    of image and noise together is 1): details of an image tell concepts apart less than they
    mislead networks. 0 is the image itself."""

    @property
    def training(self) -> Training:
        """As the options say."""
        return super().training._replace(minibatches=self.minibatches)

    def validate(self) -> None:
        """Checks that the job is complete, and every number."""
        super().validate()
        if not self.forget:
            raise ValueError("--forget is missing: see jax-unlearn concept --help.")
        check_texts(self, ("forget", "template", "base", "anchor", "retain", "show"))
        if repeated := {text for text in self.forget if self.forget.count(text) > 1}:
            raise ValueError(f"--forget {', '.join(sorted(repeated))} is given twice.")
        for name in ("chain_steps", "classifier_draws", "stored_samples"):
            if getattr(self, name) < 2:
                raise ValueError(f"{flag(name)} must be 2 or more.")
        if self.target_steps == 1:
            raise ValueError("--target-steps must be 0, or 2 or more.")
        if self.formulation == "without":
            if not self.target_steps:
                raise ValueError("--formulation without needs --target-steps of 2 or more.")
            if self.forget_batch_size % len(self.forget):
                raise ValueError(
                    f"--forget-batch-size {self.forget_batch_size} is not a multiple of the "
                    f"{len(self.forget)} concepts: each has as many attackers."
                )
            if "calibrated" in self.threshold:
                raise ValueError(
                    '--formulation without needs a --threshold: a number, or "0.05x" for '
                    "a twentieth of the reference's value under attack."
                )
        part, rank = parse_subset(self.train)
        if self.start == "edited" and (rank is not None or part == "no-cross-attention"):
            raise ValueError(
                f"--start edited changes the keys and values of cross-attention, which --train "
                f"{self.train} does not."
            )
        if self.chain_steps % self.minibatches:
            raise ValueError(
                f"--minibatches {self.minibatches} does not divide --chain-steps "
                f"{self.chain_steps}."
            )
        if self.accumulate > 1 and (self.formulation == "without" or self.minibatches > 1):
            raise ValueError(
                "--accumulate goes neither with --minibatches nor with --formulation without: "
                "their rows belong together."
            )
        if self.minibatches > 1 and (self.formulation, self.estimator) != (
            "reverse-kl",
            "stop_gradient",
        ):
            raise ValueError(
                "--minibatches are of trajectories that are held fixed: use --formulation "
                "reverse-kl --estimator stop_gradient."
            )
        check_thresholds(self.threshold, self.forget)


@dataclasses.dataclass(frozen=True)
class SampleOptions:
    """Draws a grid of samples from a diffusers checkpoint."""

    model: str = "embedded"
    """Pipeline folder, model folder or name on the hub; "embedded" is the embedded model."""
    out: pathlib.Path = pathlib.Path("samples.png")
    """The picture to write; refused if it exists, unless --overwrite."""
    overwrite: bool = False
    """Replace an existing picture."""
    labels: tuple[str, ...] = ()
    """Labels to draw, by name or number, a row each; default all of them."""
    prompts: tuple[str, ...] = ()
    """Prompts to draw, a row each, where the model is conditioned on prompts."""
    lora: pathlib.Path | None = None
    """Folder or file of a low-rank change of the model, as --save lora writes it."""
    samples: int = 10
    """Samples for each label."""
    steps: int = 50
    """Sampler steps, 1 to the number of training steps."""
    method: Literal["ddim", "ddpm"] = "ddim"
    """Sampler."""
    guidance: float = 2.5
    """Classifier-free guidance scale: 1 is none, 0 the null label alone."""
    seed: int = 0
    """Seed of the noise, 0 to 4294967295."""
    revision: str = ""
    """Models on the hub: branch, tag or commit."""

    def validate(self) -> None:
        """Checks every number and text.

        Raises:
          ValueError: naming the option.
        """
        check_numbers(self)
        check_texts(self, ("labels", "prompts"))
        if self.samples < 1:
            raise ValueError("--samples must be 1 or more, not 0.")


@dataclasses.dataclass(frozen=True)
class VerifyOptions:
    """Checks that a finished folder is what its run left, however long ago that was."""

    folder: tyro.conf.Positional[pathlib.Path] = pathlib.Path("unlearned")
    """The --out of a run."""
    seal: str = ""
    """The seal that the run printed: a digest of all digests, to be kept elsewhere. Without it a
    folder whose files were all replaced, digests included, is not told apart."""

    def validate(self) -> None:
        """Nothing to check before the folder is read."""
