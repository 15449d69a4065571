"""The exact side of constrained unlearning: closed forms, dual problems, composed denoisers."""

from jax_unlearn.duality.closed_forms import *
from jax_unlearn.duality.solutions import *
