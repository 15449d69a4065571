"""What Orbax prints from its threads, kept off the terminal."""

import functools
import logging
import os
import sys
import warnings
from typing import Any

__all__ = ["quiet_orbax"]


@functools.cache
def quiet_orbax() -> None:
    """Keeps off the terminal, from now on, what Orbax's threads print of a failed read or write.

    What went wrong is raised here too. The other arrays of the same checkpoint end later, some
    after their manager was closed, and each would print a traceback or a warning.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        said = str(unraisable.exc_value)
        code = getattr(unraisable.object, "cr_code", None)  # Of a coroutine.
        late = "Event loop is closed" in said or "was never awaited" in said
        if not late and f"{os.sep}orbax{os.sep}" not in getattr(code, "co_filename", ""):
            before(unraisable)

    sys.unraisablehook = hook
