"""Uploads a finished model to the Hugging Face hub."""

import pathlib
import shlex

__all__ = ["NotPushed", "check_push", "push"]


class NotPushed(Exception):
    """The model was not uploaded; the run itself is complete."""


def check_push(name: str) -> None:
    """Refuses an upload that cannot succeed; asks nobody.

    Args:
      name: of the repository: NAME, or OWNER/NAME.

    Raises:
      ValueError: if the name is none, no token is there, or the hub is not to be asked.
    """
    # Only here: its import is slow.
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except ValueError as error:
        raise ValueError(f"--push-to-hub takes OWNER/NAME on the hub: {error}") from error
    if constants.HF_HUB_OFFLINE:
        raise ValueError("--push-to-hub needs the hub, but HF_HUB_OFFLINE is set.")
    if huggingface_hub.get_token() is None:
        raise ValueError("--push-to-hub needs a token: run `hf auth login`, or set HF_TOKEN.")


def push(folder: pathlib.Path, name: str) -> str:
    """Uploads a model's folder as one commit, so that no half of it is ever seen.

    A repository that is not there is made, private. One that is there keeps its visibility and its
    other files.

    Args:
      folder: of the model.
      name: of the repository: NAME, or OWNER/NAME.

    Returns:
      The address of the repository.

    Raises:
      NotPushed: with the command that repeats the upload.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    files = sorted(path for path in folder.rglob("*") if path.is_file())
    added = [CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in files]
    api = HfApi()
    try:
        repository = api.create_repo(name, private=True, exist_ok=True)
        api.create_commit(
            repository.repo_id, added, commit_message="A model that jax_unlearn made to forget"
        )
    except Exception as error:  # Of the network, of the hub, and of what it refuses.
        reason = str(error).strip().partition("\n")[0]
        again = f"hf upload {shlex.quote(name)} {shlex.quote(str(folder))} . --private"
        raise NotPushed(
            f"the run is complete, but the hub did not take the model ({type(error).__name__}: "
            f"{reason}). Upload it with: {again}"
        ) from error
    return str(repository)
