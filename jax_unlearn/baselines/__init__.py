"""Weight-based unlearning methods, for comparison with constrained unlearning.

Each method is a function that returns a loss (params, reference, key, batch) -> scalar, whose
gradient in params any optax optimizer takes; losses over one kind of batch may be added. Parts of
a loss are means of their own, so that its weights do not depend on how many examples a batch has
of each. Where a method prescribes a gradient that is not that of a loss (SISS, EraseDiff), the
scalar has the prescribed one. Batches of images are `Batch`; its `base` and `kept`
are both denoised as data here. `loss` below is Σ_t w_t E‖ε − ε_θ(x_t, t, c)‖², in the unit of
the weights. The equal-weight Lagrangian is `primal_dual` with `optax.set_to_zero()`.

NegGrad: Golatkar et al. 2020 (arXiv 1911.04933). SISS: Alberti et al. 2025, Data Unlearning in
Diffusion Models (2503.01034). EraseDiff: Wu et al. 2025 (2401.05779). ESD: Gandikota et al. 2023
(2303.07345). SalUn: Fan et al. 2024 (2310.12508). Selective Amnesia: Heng and Soh 2023
(2305.10120). Concept Ablation: Kumari et al. 2023 (2303.13516). AdvUnlearn: Zhang et
al. 2024 (2405.15234).
"""

from jax_unlearn.baselines.base import loss_problem, train_step
from jax_unlearn.baselines.concepts import (
    Anchored,
    adv_unlearn,
    concept_ablation,
    esd,
    esd_target,
    partial_sample,
)
from jax_unlearn.baselines.images import (
    Remembered,
    erase_diff,
    fisher,
    naive_deletion,
    neg_grad,
    selective_amnesia,
    siss,
)
from jax_unlearn.baselines.saliency import MaskedState, masked, saliency_mask

__all__ = [
    "Anchored",
    "MaskedState",
    "Remembered",
    "adv_unlearn",
    "concept_ablation",
    "erase_diff",
    "esd",
    "esd_target",
    "fisher",
    "loss_problem",
    "masked",
    "naive_deletion",
    "neg_grad",
    "partial_sample",
    "saliency_mask",
    "selective_amnesia",
    "siss",
    "train_step",
]
