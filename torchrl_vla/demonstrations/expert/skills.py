"""Which skills reach a task's goals, and in which order."""

from __future__ import annotations

from collections.abc import Sequence

import mujoco

from torchrl_vla.demonstrations.expert.arm import Arm
from torchrl_vla.demonstrations.expert.articulation import find_articulation
from torchrl_vla.demonstrations.expert.geometry import CollisionPoints
from torchrl_vla.demonstrations.expert.insertion import Insertion, is_covered
from torchrl_vla.demonstrations.expert.joints import MoveJoint
from torchrl_vla.demonstrations.expert.pick_and_place import PickAndPlace
from torchrl_vla.demonstrations.expert.task_goals import PREDICATES, Goal, UnreachableGoalError, can_reach

__all__ = ["choose_skills", "order_goals"]


Skill = PickAndPlace | MoveJoint | Insertion


def order_goals(goals: Sequence[Goal], *, inside: Sequence[Goal] = ()) -> list[Goal]:
    """Put conditions into an order in which one does not undo or block another.

    What is closed for its own sake comes first, so that it stands in nobody's way; then what is opened or switched;
    then objects, those that others belong on before these; last what is closed around an object.

    Args:
        goals: of a task.
        inside: those that put an object into something that opens.

    Examples:
        >>> close, put = Goal("close", "drawer"), Goal("in", "bowl", "drawer")
        >>> [goal.predicate for goal in order_goals([close, put], inside=[put])]
        ['in', 'close']
    """
    moved = {goal.subject for goal in goals}

    def rank(goal: Goal) -> tuple[int, bool]:
        if goal.predicate in ("on", "in"):
            return 2, goal.target in moved
        filled = any(put.target.startswith(goal.subject) for put in inside)
        return {"close": 3 if filled else 0}.get(goal.predicate, 1), False

    return sorted(goals, key=rank)


def choose_skills(
    model: mujoco.MjModel, arm: Arm, surfaces: CollisionPoints, goals: Sequence[Goal]
) -> list[tuple[Skill, ...]]:
    """Make the skills that reach the goals one after the other.

    Args:
        model: the compiled model.
        arm: the arm.
        surfaces: collision points of the model.
        goals: of the task.

    Returns:
        list: for each goal its skill, after what has to be opened before.

    Raises:
        UnreachableGoalError: a goal is of another kind, or names what the model does not have.
    """
    if not can_reach(goals):
        unknown = ", ".join(sorted({goal.predicate for goal in goals if not can_reach([goal])}))
        raise UnreachableGoalError(
            f"The scripted expert cannot reach a goal of the kind {unknown}: it knows {', '.join(PREDICATES)}. Choose "
            "a task whose goal is of these."
        )
    inside = [goal for goal in goals if goal.predicate == "in" and find_articulation(model, goal.target)]
    steps: list[tuple[Skill, ...]] = []
    for goal in order_goals(goals, inside=inside):
        if goal.predicate not in ("on", "in"):
            steps.append((MoveJoint(model, arm, surfaces, goal),))
            continue
        before = (MoveJoint(model, arm, surfaces, Goal("open", goal.target), ajar=True),) if goal in inside else ()
        shared = goal.predicate == "on" and sum(other.target == goal.target for other in goals) > 1
        place: Skill = PickAndPlace(model, arm, surfaces, goal, shared=shared)
        if goal.predicate == "in" and _needs_insertion(model, surfaces, goal):
            place = Insertion(model, arm, surfaces, goal)
        steps.append((*before, place))
    return steps


def _needs_insertion(model: mujoco.MjModel, surfaces: CollisionPoints, goal: Goal) -> bool:
    """Whether a region is covered in every state: a compartment's, and not a drawer's, which is pulled out."""
    site = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_SITE, goal.target)
    body = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_BODY, f"{goal.subject}_main")
    if site < 0 or body < 0 or model.body_jntnum[model.site_bodyid[site]]:
        return False
    data = mujoco.MjData(model)
    mujoco.mj_kinematics(model, data)
    return is_covered(data, surfaces, site, int(model.body_rootid[model.site_bodyid[site]]))
