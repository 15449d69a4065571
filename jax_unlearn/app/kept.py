"""Measurements that are kept on disk as they end: what was measured is not measured again."""

import json
import pathlib
import re
import time
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np

from jax_unlearn.app.files import replace_file
from jax_unlearn.app.identity import digest_of
from jax_unlearn.app.terminal import say
from jax_unlearn.models.files import read_json

__all__ = ["Kept"]


class Kept:
    """Results on disk, a json file each with its arrays beside it, of what a digest stands for."""

    def __init__(self, folder: pathlib.Path, digest: str) -> None:
        self._folder, self._digest = folder, digest
        folder.mkdir(exist_ok=True)

    def _path(self, name: str) -> pathlib.Path:
        return self._folder / (re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-").lower() + ".json")

    def get(self, name: str) -> dict[str, Any] | None:
        """What was kept, or None; what is damaged is measured again."""
        path = self._path(name)
        if not path.is_file():
            return None
        try:
            stored = read_json(path)
            result, digest = stored["result"], stored["digest"]
            if (stored["of"], digest) != (self._digest, digest_of([name, result])):
                raise ValueError
            if stored["arrays"]:
                with np.load(path.with_suffix(".npz"), allow_pickle=False) as arrays:
                    result = result | {name: arrays[name] for name in stored["arrays"]}
        except (ValueError, KeyError, OSError, zipfile.BadZipFile):
            say(f"{path} is damaged: measured again.")
            return None
        return result

    def put(self, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Measures and keeps."""
        started = time.monotonic()
        result = measure() | {"seconds": 0.0}
        result["seconds"] = round(time.monotonic() - started, 2)
        arrays = {key: value for key, value in result.items() if isinstance(value, np.ndarray)}
        if arrays:
            with self._path(name).with_suffix(".npz").open("wb") as file:
                np.savez(file, allow_pickle=False, **arrays)
        plain = {key: value for key, value in result.items() if key not in arrays}
        plain = json.loads(json.dumps(plain))
        stored = {"of": self._digest, "digest": digest_of([name, plain]), "result": plain}
        stored["arrays"] = [*arrays]
        replace_file(self._path(name), (json.dumps(stored) + "\n").encode())
        return result
