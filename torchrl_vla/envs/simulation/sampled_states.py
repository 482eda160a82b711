"""Initial states drawn anew from the regions that a task's definition names, none of which is official."""

from __future__ import annotations

import contextlib
import hashlib
import io
import zlib
from pathlib import Path
from typing import Any
from unittest import mock

import mujoco
import numpy as np

from torchrl_vla.envs.simulation.model_cache import (
    cache_folder,
    compile_model,
    environment_key,
    keep_file,
    locked,
    read_states,
    write_states,
)
from torchrl_vla.envs.simulation.scene_builder import built_environment
from torchrl_vla.errors import UserError

__all__ = ["sampled_init_states"]

#: Layouts tried for one initial state before it is given up: objects may leave each other no room.
_ATTEMPTS = 20
#: Noise of the arm's joints in radians, robosuite's default, which the official states have and LIBERO's reset has not.
_ARM_NOISE = {"type": "gaussian", "magnitude": 0.02}


def sampled_init_states(bddl_file: Path, count: int, *, seed: int, fixture_seed: int = 0) -> np.ndarray:
    """Draws initial states of a task with LIBERO's own samplers, as the official ones were drawn.

    Objects are placed in the regions of the task's ``:init`` block, doors and drawers opened as it says, and the arm's
    joints get robosuite's noise (normal, 0.02 rad), which the official states show too. Fixtures stand where
    ``fixture_seed`` puts them, since an initial state does not hold their poses. State ``i`` depends on the task,
    ``seed`` and ``i``, and not on ``count``; none is an official one, which were drawn by other seeds. What was drawn
    is kept in the cache folder.

    Args:
        bddl_file: the task's definition.
        count: number of states, at least 1.
        seed: of the draw, not negative.
        fixture_seed: seed of the fixtures' poses, the simulator's; the evaluation protocol's is 0.

    Returns:
        Flattened simulator states, float64 ``[count, state_size]``; read-only.

    Raises:
        ValueError: a number is out of range, or the task's objects find no room.

    Examples:
        >>> task = get_suite("libero_spatial").task(0)  # doctest: +SKIP
        >>> sampled_init_states(task.bddl_file, 50, seed=1).shape  # doctest: +SKIP
        (50, 92)
    """
    if count < 1 or seed < 0:
        raise UserError(f"count must be at least 1 and seed not negative, got count={count} and seed={seed}.")
    text = f"{environment_key()} sampled {count} {seed} {fixture_seed} ".encode() + bddl_file.read_bytes()
    path = cache_folder() / "init_states" / f"{hashlib.sha256(text).hexdigest()[:32]}.npz"
    states = read_states(path)
    if states is None:
        with locked(path):
            states = read_states(path)
            if states is None:
                drawn = states = _draw(bddl_file, count, seed, fixture_seed)
                keep_file(path.parent, lambda target: write_states(target, drawn), lambda _: path.name)
    states.setflags(write=False)
    return states


def _draw(bddl_file: Path, count: int, seed: int, fixture_seed: int) -> np.ndarray:
    compiled: list[tuple[str, mujoco.MjModel]] = []

    def remember(xml: str) -> tuple[str, mujoco.MjModel]:
        compiled.append(compile_model(xml))
        return compiled[-1]

    generator_state = np.random.get_state()
    try:
        with (
            built_environment(bddl_file, fixture_seed, remember) as domain,
            contextlib.redirect_stdout(io.StringIO()),
            # Where LIBERO finds no room in a drawer it starts a debugger before it raises.
            mock.patch("pdb.set_trace"),
        ):
            _hold_fixtures(domain)
            domain.robots[0].initialization_noise = _ARM_NOISE
            name = bddl_file.name
            task = zlib.crc32(bddl_file.read_bytes())
            return np.stack([_draw_one(domain, compiled[-1][1], name, [seed, task, index]) for index in range(count)])
    finally:
        np.random.set_state(generator_state)
        compile_model.cache_clear()


class _Held:
    """Stands in for a sampler and leaves its fixture where it is."""

    def __init__(self, placement: tuple[np.ndarray, np.ndarray, Any]) -> None:
        self.placement = placement

    def sample(self, fixtures: dict[str, Any] | None = None, **_: Any) -> dict[str, Any]:
        """Add the fixture to what is placed."""
        return {**(fixtures or {}), self.placement[2].name: self.placement}


def _hold_fixtures(domain: Any) -> None:
    """Has the next draws take the fixtures' present poses."""
    samplers, model = domain.placement_initializer.samplers, domain.sim.model
    for name, sampler in samplers.items():
        (item,) = sampler.mujoco_objects
        if item.name in domain.fixtures_dict:
            body = model.body_name2id(item.root_body)
            samplers[name] = _Held((model.body_pos[body].copy(), model.body_quat[body].copy(), item))


def _draw_one(domain: Any, unplaced: mujoco.MjModel, task: str, seed: list[int]) -> np.ndarray:
    # Not before now: robosuite would choose EGL when it is imported.
    from robosuite.utils.errors import RandomizationError

    model = domain.sim.model
    for attempt in range(_ATTEMPTS):
        # Samplers add a fixture's pose to its sites' positions, which must be those it has where the XML puts it.
        model.body_pos[:], model.body_quat[:] = unplaced.body_pos, unplaced.body_quat
        domain.sim.reset()
        np.random.seed([*seed, attempt])
        with contextlib.suppress(RandomizationError):
            domain._reset_internal()
            return domain.sim.get_state().flatten()
    raise UserError(f"No layout of {task} was found in {_ATTEMPTS} tries: its objects leave each other no room.")
