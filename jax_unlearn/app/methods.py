"""The methods of --method: what each minimises, what its --strength is, and what it refuses."""

from collections.abc import Mapping
from typing import Any, NamedTuple

__all__ = ["CONSTRAINED", "METHODS", "SAMPLED", "Method", "about", "check", "strength_of"]

CONSTRAINED = "constrained"
"""The method that is not a baseline."""

SAMPLED = ("concept-ablation", "neg-grad", "selective-amnesia")
"""Those that, on conditions, train on stored samples of the reference."""


class Method(NamedTuple):
    """A weight-based method.

    Attributes:
      title: as reports call it.
      formula: what is minimised. ℓ is the denoising loss Σ_t w_t E‖ε − ε_θ(x_t, c)‖², q the
        reference, c what is forgotten.
      source: where it was published.
      strength: the symbol of its one knob in the formula; "" without one.
      meaning: of the knob, and what a larger one does.
      default: of the knob; None without one.
      whole: it weighs or chooses by gradients of all parameters, and trains all.
    """

    title: str
    formula: str
    source: str
    strength: str = ""
    meaning: str = ""
    default: float | None = None
    whole: bool = False


METHODS: Mapping[str, Method] = {
    "naive-deletion": Method(
        "Naive deletion",
        "ℓ(retained)",
        "training on without what is forgotten",
    ),
    "neg-grad": Method(
        "NegGrad",
        "ℓ(retained) − s ℓ(forgotten)",
        "Golatkar et al. 2020, arXiv 1911.04933",
        "s",
        "weight of the ascent; a larger one forgets more",
        0.1,
    ),
    "siss": Method(
        "SISS",
        "gradient g_x − ν g_a/‖g_a‖, clipped to 1: g_x of ℓ(retained), g_a of ℓ(forgotten), both "
        "at x_t of the mixture ½ q(·|retained) + ½ q(·|forgotten) by importance weights",
        "Alberti et al. 2025, arXiv 2503.01034",
        "ν",
        "norm of the ascent's gradient; a larger one forgets more",
        0.01,
        whole=True,
    ),
    "siss-no-is": Method(
        "SISS without importance sampling",
        "gradient g_x − ν g_a/‖g_a‖, clipped to 1: g_x of ℓ(retained), g_a of ℓ(forgotten)",
        "Alberti et al. 2025, arXiv 2503.01034",
        "ν",
        "norm of the ascent's gradient; a larger one forgets more",
        0.01,
        whole=True,
    ),
    "erase-diff": Method(
        "EraseDiff",
        "gradient g_r + λ g_f, λ = max(0, η − ⟨g_r, g_f⟩/‖g_f‖²): g_r of ℓ(retained), g_f of "
        "ℓ(forgotten) with uniform noise",
        "Wu et al. 2025, arXiv 2401.05779",
        "η",
        "rate at which forgetting must go on; a larger one forgets more",
        0.1,
        whole=True,
    ),
    "saliency": Method(
        "SalUn",
        "Σ_t w_t E‖ε_θ(x_t, c) − ε_θ(x_t, c′)‖² over images of c, c′ another label, held fixed, "
        "+ β ℓ(retained); of the parameters half train, those with the largest |∇ℓ(forgotten)|",
        "Fan et al. 2024, arXiv 2310.12508",
        "β",
        "weight of what is retained; a larger one forgets less",
        1.0,
        whole=True,
    ),
    "selective-amnesia": Method(
        "Selective Amnesia",
        "ℓ(surrogates under c) + ℓ(retained) + (λ/2) Σ_j F_j (θ_j − θ*_j)², F the Fisher "
        "information of the reference on what is retained",
        "Heng and Soh 2023, arXiv 2305.10120",
        "λ",
        "weight of the penalty; a larger one forgets less",
        10.0,
        whole=True,
    ),
    "esd": Method(
        "ESD",
        "E‖ε_θ(x_t, c) − (ε_q(x_t, ∅) − η (ε_q(x_t, c) − ε_q(x_t, ∅)))‖², x_t of p's own guided "
        "sampler",
        "Gandikota et al. 2023, arXiv 2303.07345",
        "η",
        "negative guidance of the target; a larger one forgets more",
        1.0,
    ),
    "concept-ablation": Method(
        "Concept Ablation",
        "Σ_t w_t E‖ε_θ(x_t, c) − ε_θ(x_t, base)‖² over samples of the base, ε_θ(x_t, base) held "
        "fixed, + ρ ℓ(samples of the base)",
        "Kumari et al. 2023, arXiv 2303.13516",
        "ρ",
        "weight of preserving the base; a larger one forgets less",
        1.0,
    ),
    "uce": Method(
        "UCE",
        "keys and values W M of cross-attention, M = argmin s Σ‖M c − base‖² + Σ‖M k − k‖² + "
        "ρ‖M − I‖² over tokens of what is forgotten (c) and kept (k); no steps",
        "Gandikota et al. 2024, arXiv 2308.14761",
        "s",
        "weight of what is forgotten; a larger one forgets more",
        1.0,
    ),
    "adv-unlearn": Method(
        "AdvUnlearn",
        "E‖ε_θ(x_t, c*) − (ε_q(x_t, ∅) − (ε_q(x_t, c) − ε_q(x_t, ∅)))‖² + γ E‖ε_θ(x_t, k) − "
        "ε_q(x_t, k)‖² over kept k, c* near c where an attack finds ε_θ(x_t, c*) ≈ ε_q(x_t, c)",
        "Zhang et al. 2024, arXiv 2405.15234",
        "γ",
        "weight of what is kept; a larger one forgets less",
        0.3,
    ),
    "equal-weights": Method(
        "Equal weights",
        "the problem's own Lagrangian, objective + (Λ/m) Σᵢ violationᵢ over its m constraints, Λ "
        "held fixed",
        "Khalafi et al. 2026, arXiv 2605.30825",
        "Λ",
        "sum of the multipliers; a larger one forgets more",
        0.5,
    ),
}  # fmt: skip

# What only moving multipliers read.
_OF_MULTIPLIERS = ("dual_damping", "max_multiplier", "corrections", "minibatches")
_LARGEST = 3.4e38


def strength_of(options: Any) -> float | None:
    """--strength, or the method's default; None of a method without one."""
    method = METHODS[options.method]
    return method.default if options.strength is None else options.strength


def about(options: Any) -> dict[str, Any]:
    """What a report says of the method: plain values."""
    method = METHODS[options.method]
    return {
        "name": options.method,
        "title": method.title,
        "formula": method.formula,
        "source": method.source,
        "symbol": method.strength,
        "strength": strength_of(options),
        "meaning": method.meaning,
        "multipliers": options.method == "equal-weights",
    }


def check(options: Any) -> None:
    """Refuses options that do not go together with --method, before anything is loaded.

    Args:
      options: of `data` or `concept`.

    Raises:
      ValueError: naming the option, what was given and what is allowed.
    """
    name, given = options.method, options.strength
    if name == CONSTRAINED:
        if given is not None:
            raise ValueError(
                "--strength is the weight of a baseline: give --method too. Constraints have "
                "--threshold."
            )
        return
    method = METHODS[name]
    _check_strength(options, method)
    _check_unused(options)
    if name != "equal-weights" and (options.accumulate > 1 or options.parallel == "pmap"):
        raise ValueError(
            f"--method {name} has a loss of whole batches: leave --accumulate and --parallel pmap "
            "out."
        )
    if method.whole and options.train != "full":
        raise ValueError(
            f"--method {name} goes by gradients of all parameters: it trains full, not "
            f"{options.train}."
        )
    if name == "siss" and options.forget_batch_size > options.batch_size:
        raise ValueError(
            f"--method siss pairs each of --forget-batch-size {options.forget_batch_size} images "
            f"with a retained one of --batch-size {options.batch_size}: lower the first."
        )
    if name == "uce":
        if options.steps:
            raise ValueError("--method uce is a closed form: it takes --steps 0.")
        if options.train != "full":
            raise ValueError("--method uce edits keys and values itself: leave --train out.")
        if getattr(options, "start", None) is not None:
            raise ValueError("--method uce edits the reference: leave --start out.")


def _check_strength(options: Any, method: Method) -> None:
    given = options.strength
    if given is None:
        return
    if method.default is None:
        raise ValueError(f"--method {options.method} has no weight: leave --strength out.")
    # Beyond 1 the Lagrangian of path KLs falls without bound.
    within = options.method == "equal-weights" and getattr(options, "formulation", "") not in (
        "likelihood",
        "without",
    )
    if not 0 <= given <= _LARGEST or (within and given >= 1):
        domain = "lie in [0, 1)" if within else "be 0 or more, and finite"
        raise ValueError(
            f"--strength of --method {options.method} ({method.meaning}) must {domain}, not "
            f"{given}."
        )


def _check_unused(options: Any) -> None:
    """Refuses what only moving multipliers, or the constrained problem's own gradient, read."""
    unused = list(_OF_MULTIPLIERS)
    if getattr(options, "formulation", "") != "without":  # There the command has its own default.
        unused.append("dual_learning_rate")
    if options.method != "equal-weights":
        unused.append("estimator")
    for name in unused:
        if getattr(options, name, None) != getattr(type(options), name, None):
            raise ValueError(
                f"--{name.replace('_', '-')} is of constraints: --method {options.method} does "
                "not read it."
            )
