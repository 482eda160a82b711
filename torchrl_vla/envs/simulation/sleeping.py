"""Leaving out of the physics what lies still where nothing comes near it: most objects, most of the time.

A scene's objects rest on dozens of contacts, and finding these and solving for their forces is most of a substep. What
has come to rest (slower than 5e-6 m/s) is put to sleep: it keeps its pose exactly and collides with nothing, until
something that is awake comes within 2 cm of its bounding box. Engines of games do the same; MuJoCo 3.3.2, which stock's
bits need, cannot.
"""

from __future__ import annotations

from typing import NamedTuple

import mujoco
import numpy as np

from torchrl_vla.envs.simulation.compiled import compiled

__all__ = ["Sleep", "Trees", "find_still", "make_sleep", "make_trees", "put_to_sleep", "unhide"]

#: Largest speed at rest (m/s and rad/s), and control steps in a row after which it counts as rest.
_STILL_SPEED, _STILL_STEPS = 5e-6, 2
#: Distance at which something wakes: in a substep of 2 ms it is crossed at 10 m/s.
_MARGIN = 0.02


class Trees(NamedTuple):
    """A model's kinematic trees, each of which sleeps as a whole; constant but for the model's own two arrays.

    Args:
        robot: ``[1]`` the robot's tree, which never sleeps.
        qpos, dofs: ``[ntree, 2]`` where each tree's positions and velocities begin and end.
        body_tree: ``[nbody]`` tree of each body, -1 for those that cannot move.
        geom_tree: ``[n]`` tree of the geoms that move and collide, which are ``geom``.
        geom: ``[n]`` their indices in the model.
        radius: ``[n]`` of the spheres around their centres.
        box: ``[n, 6]`` centres and half-sizes of their bounding boxes, in their frames.
        contype, conaffinity: ``[nbody]`` what bodies collide with while awake.
        body_contype, body_conaffinity: the same arrays of the model, which say what they collide with now.
    """

    robot: np.ndarray
    qpos: np.ndarray
    dofs: np.ndarray
    body_tree: np.ndarray
    geom_tree: np.ndarray
    geom: np.ndarray
    radius: np.ndarray
    box: np.ndarray
    contype: np.ndarray
    conaffinity: np.ndarray
    body_contype: np.ndarray
    body_conaffinity: np.ndarray


class Sleep(NamedTuple):
    """Which trees of a slot sleep, and where; written in place.

    Args:
        asleep: ``[ntree]`` 1 for those that do.
        still: ``[ntree]`` control steps for which they have been at rest.
        bounds: ``[ntree, 6]`` lowest and highest corner of sleeping trees in the world, with the margin.
        pose: ``[nq]`` positions of sleeping trees.
    """

    asleep: np.ndarray
    still: np.ndarray
    bounds: np.ndarray
    pose: np.ndarray


def make_trees(model: mujoco.MjModel, robot_dof: int) -> Trees:
    """Describe a model's trees.

    Args:
        model: the compiled model, with the collision flags that it was compiled with.
        robot_dof: a degree of freedom of the robot.
    """
    joint_sizes = np.array([7, 4, 1, 1])[model.jnt_type]
    qpos, dofs = np.empty((model.ntree, 2), dtype=np.int64), np.empty((model.ntree, 2), dtype=np.int64)
    for tree in range(model.ntree):
        own = np.flatnonzero(model.dof_treeid == tree)
        joints = model.dof_jntid[own]
        # Bodies are ordered depth first, so that a tree's joints follow each other.
        qpos[tree] = model.jnt_qposadr[joints[0]], model.jnt_qposadr[joints[-1]] + joint_sizes[joints[-1]]
        dofs[tree] = own[0], own[-1] + 1
    collides = (model.geom_contype != 0) | (model.geom_conaffinity != 0)
    geom = np.flatnonzero(collides & (model.body_treeid[model.geom_bodyid] >= 0))
    return Trees(
        robot=np.array([model.dof_treeid[robot_dof]], dtype=np.int64),
        qpos=qpos,
        dofs=dofs,
        body_tree=model.body_treeid.astype(np.int64),
        geom_tree=model.body_treeid[model.geom_bodyid[geom]].astype(np.int64),
        geom=geom,
        radius=model.geom_rbound[geom],
        box=model.geom_aabb[geom],
        contype=model.body_contype.copy(),
        conaffinity=model.body_conaffinity.copy(),
        body_contype=model.body_contype,
        body_conaffinity=model.body_conaffinity,
    )


def make_sleep(model: mujoco.MjModel) -> Sleep:
    """Describe a slot in which all is awake."""
    return Sleep(
        asleep=np.zeros(model.ntree, dtype=np.int64),
        still=np.zeros(model.ntree, dtype=np.int64),
        bounds=np.zeros((model.ntree, 6)),
        pose=np.zeros(model.nq),
    )


@compiled
def unhide(trees):  # type: ignore[no-untyped-def]
    """Lets all bodies collide, as the model was compiled; undoes `hide_sleeping`."""
    trees.body_contype[:] = trees.contype
    trees.body_conaffinity[:] = trees.conaffinity


@compiled
def find_still(trees, sleep, views):  # type: ignore[no-untyped-def]
    """Count control steps at rest; return whether any tree that is awake has rested for long enough to sleep."""
    found = False
    for tree in range(sleep.asleep.shape[0]):
        if sleep.asleep[tree] or tree == trees.robot[0]:
            continue
        still = True
        for i in range(trees.dofs[tree, 0], trees.dofs[tree, 1]):
            still = still and abs(views.qvel[i]) < _STILL_SPEED
        sleep.still[tree] = sleep.still[tree] + 1 if still else 0
        found = found or sleep.still[tree] >= _STILL_STEPS
    return found


@compiled
def put_to_sleep(trees, sleep, views):  # type: ignore[no-untyped-def]
    """Put to sleep what has rested for long enough, also where something that is awake is near: `wake` comes next."""
    for tree in range(sleep.asleep.shape[0]):
        if sleep.asleep[tree] or sleep.still[tree] < _STILL_STEPS:
            continue
        sleep.asleep[tree] = 1
        for i in range(trees.qpos[tree, 0], trees.qpos[tree, 1]):
            sleep.pose[i] = views.qpos[i]
        sleep.bounds[tree, :3] = np.inf
        sleep.bounds[tree, 3:] = -np.inf
    for i in range(trees.geom.shape[0]):
        tree = trees.geom_tree[i]
        if not sleep.asleep[tree]:
            continue
        geom = trees.geom[i]
        for axis in range(3):
            middle, half = views.geom_xpos[geom, axis], _MARGIN
            for k in range(3):
                turn = views.geom_xmat[geom, 3 * axis + k]
                middle += turn * trees.box[i, k]
                half += abs(turn) * trees.box[i, 3 + k]
            sleep.bounds[tree, axis] = min(sleep.bounds[tree, axis], middle - half)
            sleep.bounds[tree, 3 + axis] = max(sleep.bounds[tree, 3 + axis], middle + half)
