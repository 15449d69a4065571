"""maxdiffusion's checkpoints of Stable Diffusion 1, 2 and XL, read and written without its code.

maxdiffusion saves by Orbax. FOLDER/STEP holds an item of json for each configuration, such as
`unet_config`, and for each network the item of a Flax train state, such as `unet_state`, whose
`params` are named as in diffusers' former Flax models.
"""

from jax_unlearn.pretrained.maxdiffusion.reading import find_checkpoint
from jax_unlearn.pretrained.maxdiffusion.writing import check_writable, save_maxdiffusion

__all__ = ["check_writable", "find_checkpoint", "save_maxdiffusion"]
