"""Where a model's files lie: in a folder here, or on the Hugging Face hub."""

import os
import pathlib
import re
from collections.abc import Callable

__all__ = ["find_model"]


def find_model(
    path_or_name: str | os.PathLike[str],
) -> tuple[pathlib.Path, Callable[[list[str]], None]]:
    """Finds a model's folder, and fetches its descriptions if it is on the hub.

    Args:
      path_or_name: a folder, or `owner/name` on the hub.

    Returns:
      The folder, with all json files; and a function to be called with the patterns of other
      files, e.g. `unet/*.safetensors`, before these are read. It does nothing for a folder here.

    Raises:
      ValueError: if there is no such model.
    """
    folder = pathlib.Path(path_or_name)
    name = os.fspath(path_or_name)
    if folder.is_dir():
        return folder, lambda patterns: None
    if folder.exists():
        raise ValueError(f"{name} is a file: pass the folder that holds model_index.json.")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name):
        raise ValueError(f"no such folder: {name}. It is no name on the hub (owner/name) either.")

    def fetch(patterns: list[str]) -> pathlib.Path:
        # Only here: its import is slow, and a folder needs none of it.
        import huggingface_hub

        try:
            return pathlib.Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
        except Exception as error:
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(
                f"{name} is no folder here, and the Hugging Face hub did not give it: "
                f"{type(error).__name__}: {reason}"
            ) from error

    # The descriptions first, so that a model that is not supported is not downloaded.
    descriptions = ["*.json"]
    return fetch(descriptions), lambda patterns: (fetch(descriptions + patterns), None)[1]
