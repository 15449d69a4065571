"""How a run begins or goes on: run.json, its legs, and the last whole checkpoint."""

from collections.abc import Callable, Mapping

import numpy as np

from jax_unlearn.app import identity as identities
from jax_unlearn.app import outcome
from jax_unlearn.app.checkpoint import Checkpoints
from jax_unlearn.app.identity import Identity, Leg
from jax_unlearn.app.loop import restore
from jax_unlearn.app.options import RunOptions
from jax_unlearn.app.run_file import save_run
from jax_unlearn.primal_dual import PrimalDualState

__all__ = ["begin", "legs_of", "restored_state"]


def begin(options: RunOptions, command: str, identity: Identity) -> dict[str, str]:
    """Writes run.json, or says what has changed since the run that is resumed, where it may.

    Raises:
      ValueError: if what has changed may not.
    """
    path = options.out / "run.json"
    if options.resume:
        changed = identities.changes(path, identity, options)
    else:
        changed = {}
        leg = Leg(0, identities.digest_of(identity._asdict()), (), outcome.device())
        save_run(path, command, options, **identities.plain(identity, [leg]))
    return changed


def legs_of(
    options: RunOptions, command: str, identity: Identity, changed: Mapping[str, str], done: int
) -> list[Leg]:
    """The legs of the run, the one that begins after `done` steps among them, as in run.json."""
    path = options.out / "run.json"
    legs = identities.saved_legs(path)
    current = legs[-1]
    if changed:
        digest = identities.digest_of(identity._asdict())
        current = Leg(done, digest, tuple(changed.values()), outcome.device())
    current = current._replace(after=min(current.after, done))
    kept = [leg for leg in legs if leg.after < current.after]
    if not kept:  # No step of another leg is left.
        current = current._replace(changed=())
    found = [*kept, current]
    if found != list(legs):
        save_run(path, command, options, **identities.plain(identity, found))
    return found


def restored_state(
    checkpoints: Checkpoints,
    options: RunOptions,
    state: PrimalDualState,
    changed: Mapping[str, str],
    tell: Callable[[str], None],
) -> PrimalDualState:
    """The last whole state, with the thresholds of this leg; the given one if there is none.

    Raises:
      ValueError: if there is no whole one, or it is of another run.
    """
    known = {leg.digest for leg in identities.saved_legs(options.out / "run.json")}
    restored = restore(checkpoints, options.out, state, known=known, steps=options.steps, tell=tell)
    if restored is None:
        return state
    if "threshold" in changed:
        return restored._replace(thresholds=state.thresholds)
    if not np.allclose(restored.thresholds, state.thresholds, rtol=1e-2):
        raise ValueError(
            f"the thresholds are measured as {np.asarray(state.thresholds)}, and the run began "
            f"with {np.asarray(restored.thresholds)}: start anew with another --out."
        )
    return restored
