"""What is audited: two models and perhaps an oracle, what was to be forgotten, and who judges."""

from jax_unlearn.app.audit.options import AuditOptions
from jax_unlearn.app.audit.subject.labels import of_labels
from jax_unlearn.app.audit.subject.parts import Concept, Domains, Subject, Target
from jax_unlearn.app.audit.subject.prompts import of_prompts
from jax_unlearn.pretrained.text_to_image import is_text_to_image

__all__ = ["Concept", "Domains", "Subject", "Target", "load_subject"]


def load_subject(options: AuditOptions) -> Subject:
    """Loads the models, and checks that they can be compared, before anything is sampled.

    Raises:
      ValueError: for models of different networks, schedules, tokenizers or labels, for a judge
        that does not know the concept, for too few images, or as `load_pretrained`,
        `load_text_to_image`, `make_request`, `make_prompt_request` and `load_sscd`.
    """
    if options.reference == "embedded-text" or (
        options.reference != "embedded" and is_text_to_image(options.reference)
    ):
        return of_prompts(options)
    return of_labels(options)
