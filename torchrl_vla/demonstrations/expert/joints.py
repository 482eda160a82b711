"""Opening and closing drawers and doors, turning knobs: the hand holds or pushes a part and follows its joint."""

from __future__ import annotations

from collections.abc import Generator

import mujoco
import numpy as np

from torchrl_vla.demonstrations.expert.arm import GRIPPER_CLOSE, GRIPPER_OPEN, Arm
from torchrl_vla.demonstrations.expert.articulation import find_articulation
from torchrl_vla.demonstrations.expert.geometry import CollisionPoints
from torchrl_vla.demonstrations.expert.grasps import plan_grasp
from torchrl_vla.demonstrations.expert.handles import PUSH_GAP, Hold, plan_hold, plan_push
from torchrl_vla.demonstrations.expert.motion import Phase, straight, travel
from torchrl_vla.demonstrations.expert.task_goals import Goal, UnreachableGoalError

__all__ = ["MoveJoint"]

#: Shares of a range at which a joint is as LIBERO's goals want it: drawers from 0.875 on, doors from 0.62, knobs 0.24.
_OPEN_SLIDE, _OPEN_HINGE, _ON = 0.92, 0.7, 0.36
#: What a knob is turned by in one go, in radians.
_KNOB_TURN = 1.3
#: Shares from which on a drawer or door lets things in.
_AJAR_SLIDE, _AJAR_HINGE = 0.7, 0.6
#: Shut doors may rest this share short of the end of their range; drawers and knobs must be pressed past 0.
_SHUT = 0.002
_LEAD, _KNOB_LEAD, _STALLED_STEPS, _STALLED = 0.03, 0.35, 12, 0.0005
_CLOSE_STEPS, _CLOSE_STEPS_AT_MOST, _FIRM_STEPS, _LOST_STEPS, _FOLLOW_STEPS = 9, 18, 3, 4, 140
_OPEN_STEPS, _REACH_STEPS = 6, 25
_KNOB_TOP, _APPROACH, _RETREAT = 0.03, 0.08, 0.07
_HOLD_SPEED, _PUSH_SPEED, _REACH_SPEED = 0.5, 0.6, 0.6


class MoveJoint:
    """Moves a drawer, a door or a knob to where a goal wants it.

    Args:
        model: the compiled model.
        arm: the arm.
        surfaces: collision points of the model.
        goal: ``open``, ``close``, ``turnon`` or ``turnoff`` of an object or of a drawer's region.
        ajar: whether it is only to let something in, so that a drawer that is almost open will do.

    Raises:
        UnreachableGoalError: the model has no such joint.
    """

    def __init__(
        self, model: mujoco.MjModel, arm: Arm, surfaces: CollisionPoints, goal: Goal, *, ajar: bool = False
    ) -> None:
        articulation = find_articulation(model, goal.subject)
        if articulation is None:
            raise UnreachableGoalError(
                f"The model has no object or site {goal.subject!r} that slides or turns, which the goal {goal} names."
            )
        self._goal = goal
        self._arm = arm
        self._surfaces = surfaces
        self._joint = articulation
        self._ajar = ajar
        self._opens = goal.predicate in ("open", "turnon")

    def check(self, data: mujoco.MjData) -> None:
        """Refuses a handle that the hand cannot take hold of, as that of a drawer just above the table.

        Args:
            data: current poses.

        Raises:
            UnreachableGoalError: the hand would be in the table.
        """
        points, others = self._surfaces.part(data, self._joint.bodies)
        if not self._opens or self._is_enough(data) or self._joint.is_knob(data, points):
            return
        if not plan_hold(self._arm, data, self._joint, points, others, self._surfaces.ground(data)):
            raise UnreachableGoalError(
                f"The scripted expert cannot reach the goal {self._goal}: the handle is so near to the table that the "
                "hand does not fit around it. Choose a task that opens a higher drawer or a door."
            )

    def done(self, data: mujoco.MjData) -> bool:
        """Whether the joint is where the goal wants it.

        Args:
            data: current joint values.
        """
        opening = self._joint.opening(data)
        if self._opens:
            return opening > self._wanted(data)
        return opening < (_SHUT if self._joint.closed == 0.0 else 0.0)

    def script(self, data: mujoco.MjData) -> Generator[np.ndarray, None, None]:
        """Yield actions ``[7]`` until the joint is there.

        Args:
            data: the simulation, read anew before every action.
        """
        attempt = 0
        if self._is_enough(data):
            return
        while not self.done(data):
            points, others = self._surfaces.part(data, self._joint.bodies)
            if self._joint.is_knob(data, points):
                yield from self._turn(data, points, others)
            else:
                holds = self._holds(data, points, others)
                if not holds:  # a handle out of reach as things are now, such as that of a drawer that was just closed
                    return
                move = self._pull if self._opens else self._push
                yield from move(data, holds[attempt % len(holds)], np.concatenate([points, others]))
            attempt += 1

    def _holds(self, data: mujoco.MjData, points: np.ndarray, others: np.ndarray) -> list[Hold]:
        """Places where the hand can pull the handle, or push against it."""
        if not self._opens:
            return plan_push(self._arm, data, self._joint, points, others)
        return plan_hold(self._arm, data, self._joint, points, others, self._surfaces.ground(data))

    def _is_enough(self, data: mujoco.MjData) -> bool:
        ajar = _AJAR_SLIDE if self._joint.slides else _AJAR_HINGE
        return self._joint.opening(data) > ajar if self._ajar else self.done(data)

    def _wanted(self, data: mujoco.MjData) -> float:
        if self._goal.predicate == "turnon":
            return _ON
        return _OPEN_SLIDE if self._joint.slides else _OPEN_HINGE

    def _turn(self, data: mujoco.MjData, points: np.ndarray, others: np.ndarray) -> Phase:
        """Grasps a knob from above and turns the hand with it."""
        ridge = points[points[:, 2] > points[:, 2].max() - _KNOB_TOP]
        grasp = plan_grasp(self._arm, data, ridge, others, approach=_APPROACH, carry=np.zeros(3))
        left = (self._joint.opened * _ON if self._opens else self._joint.closed) - self._joint.value(data)
        change = float(np.clip(left, -_KNOB_TURN, _KNOB_TURN))

        def wrist_turn(rotation: np.ndarray) -> float:
            end = self._joint.carried(data, grasp.position, rotation, change)
            return max(self._arm.turn_from_rest(data, grasp.position, rotation), self._arm.turn_from_rest(data, *end))

        # The hand fits either way round.
        rotation = min((grasp.rotation, grasp.rotation * [-1.0, -1.0, 1.0]), key=wrist_turn)
        hold = Hold(grasp.position, rotation)
        return (yield from self._pull(data, hold, np.concatenate([points, others])))

    def _pull(self, data: mujoco.MjData, hold: Hold, obstacles: np.ndarray) -> Phase:
        arm = self._arm
        before = hold.position - _APPROACH * hold.rotation[:, 2]
        if not (yield from travel(arm, data, before, hold.rotation, GRIPPER_OPEN, obstacles)):
            return False
        yield from straight(arm, data, hold.position, hold.rotation, GRIPPER_OPEN, _REACH_SPEED, _REACH_STEPS)
        firm = 0
        for step in range(_CLOSE_STEPS_AT_MOST):
            firm = firm + 1 if arm.fingers_touching(data, self._joint.root) == 2 else 0
            if step >= _CLOSE_STEPS and firm >= _FIRM_STEPS:
                break
            yield arm.towards(data, hold.position, hold.rotation, GRIPPER_CLOSE)
        went = yield from self._follow(data, GRIPPER_CLOSE, _HOLD_SPEED)
        here, rotation = arm.pose(data)
        for _ in range(_OPEN_STEPS):
            yield arm.towards(data, here, rotation, GRIPPER_OPEN)
        back = here - _RETREAT * rotation[:, 2]
        yield from straight(arm, data, back, rotation, GRIPPER_OPEN)
        return went

    def _push(self, data: mujoco.MjData, hold: Hold, obstacles: np.ndarray) -> Phase:
        arm = self._arm
        before = hold.position - _APPROACH * hold.rotation[:, 2]
        if not (yield from travel(arm, data, before, hold.rotation, GRIPPER_CLOSE, obstacles)):
            return False
        yield from straight(arm, data, hold.position, hold.rotation, GRIPPER_CLOSE, _REACH_SPEED, _REACH_STEPS)
        went = yield from self._follow(data, GRIPPER_CLOSE, _PUSH_SPEED, held=False)
        here, rotation = arm.pose(data)
        yield from straight(arm, data, here - _RETREAT * rotation[:, 2], rotation, GRIPPER_CLOSE)
        return went

    def _follow(self, data: mujoco.MjData, gripper: float, speed: float, held: bool = True) -> Phase:
        """Move the hand as the part moves, a little ahead of it."""
        arm, joint = self._arm, self._joint
        position, rotation = arm.pose(data)
        start = joint.value(data)
        length = joint.arm_length(data, position)
        ahead = _LEAD if held else _LEAD + PUSH_GAP
        lead = ahead / length if joint.slides or length > 2 * _LEAD else _KNOB_LEAD
        way = np.sign(joint.opened if self._opens else -joint.opened)
        lead *= way
        furthest, stalled, without = start, 0, 0
        knob = abs(lead) == _KNOB_LEAD
        for _ in range(_FOLLOW_STEPS):
            value = joint.value(data)
            if self.done(data) or knob and abs(value - start) > _KNOB_TURN:
                return True  # a knob that is to be turned further is taken hold of anew
            stalled = 0 if (value - furthest) * way > _STALLED * abs(joint.opened) else stalled + 1
            without = 0 if not held or arm.fingers_touching(data, joint.root) else without + 1
            if stalled >= _STALLED_STEPS or without >= _LOST_STEPS:
                return False
            furthest = max(furthest, value, key=lambda reached: reached * way)
            yield arm.towards(data, *joint.carried(data, position, rotation, value - start + lead), gripper, speed)
        return False
