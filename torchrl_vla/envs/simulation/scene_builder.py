"""Building a task once through LIBERO and robosuite, to keep its compiled model and its ``Scene``."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import mujoco
import numpy as np

from torchrl_vla.envs.installation import import_libero_envs
from torchrl_vla.envs.rendering import configure_rendering
from torchrl_vla.envs.simulation.scene import COMPARISONS, Burner, Predicate, Scene
from torchrl_vla.errors import UserError

__all__ = ["build_scene", "built_environment"]

#: Gives the compiled model of an XML text, and its key.
Compiler = Callable[[str], tuple[str, mujoco.MjModel]]


class _NoRenderContext:
    """Does to the simulation what robosuite's render context does, and draws nothing.

    Making a context evaluates the forward dynamics once, which is part of the state that a reset leaves.
    """

    offscreen = True

    def __init__(self, sim: Any, device_id: int = -1) -> None:
        sim.forward()
        sim.add_render_context(self)
        self.vopt = mujoco.MjvOption()

    def render(self, **_: Any) -> None:
        """Draws nothing."""

    def read_pixels(self, width: int, height: int, **_: Any) -> np.ndarray:
        """Return a black picture."""
        return np.zeros((height, width, 3), np.uint8)


def build_scene(bddl_file: Path, seed: int, compiler: Compiler) -> tuple[Scene, mujoco.MjModel]:
    """Build a task's environment and note down what it came to.

    Args:
        bddl_file: the task's definition.
        seed: NumPy's seed before the reset.
        compiler: gives the compiled model of an XML text; asked twice for the same one.

    Returns:
        tuple: the scene and its compiled model, in which fixtures are where the XML has them.

    Raises:
        ValueError: the goal asks for something that is not known here.
    """
    compiled: list[tuple[str, mujoco.MjModel]] = []

    def remember(xml: str) -> tuple[str, mujoco.MjModel]:
        compiled.append(compiler(xml))
        return compiled[-1]

    with built_environment(bddl_file, seed, remember) as domain:
        key, model = compiled[-1]
        scene = Scene(
            model_key=key,
            arrays=_robot_arrays(domain) | _arm_arrays(domain) | _state_arrays(domain),
            eef_body=domain.sim.model.body_name2id(domain.robots[0].robot_model.eef_name),
            gripper_qpos=_ints(domain.robots[0]._ref_gripper_joint_pos_indexes),
            goal=tuple(_predicate(domain, state) for state in domain.parsed_problem["goal_state"]),
            burners=tuple(_burners(domain)),
            object_bodies={item.name: int(domain.obj_body_id[item.name]) for item in domain.objects},
        )
    return scene, model


@contextlib.contextmanager
def built_environment(bddl_file: Path, seed: int, compiler: Compiler) -> Iterator[Any]:
    """Construct LIBERO's environment of a task without OpenGL (pictures are black), seed it and reset it once.

    The fixtures' poses depend on the seed and are not part of an initial state. They are those of the first reset after
    construction: a later one on the same environment would move them, even with the same seed.

    Args:
        bddl_file: the task's definition.
        seed: NumPy's seed before the reset.
        compiler: gives the compiled model of an XML text.

    Yields:
        BDDLBaseDomain: robosuite's environment.
    """
    # robosuite would choose EGL for this process when it is imported.
    configure_rendering()
    envs = import_libero_envs()
    generator_state = np.random.get_state()
    with _stubbed_robosuite(compiler):
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                env = envs.OffScreenRenderEnv(bddl_file_name=str(bddl_file), camera_heights=8, camera_widths=8)
                env.seed(seed)
                env.reset()
        finally:
            np.random.set_state(generator_state)
        try:
            yield env.env
        finally:
            env.close()


@contextlib.contextmanager
def _stubbed_robosuite(compiler: Compiler) -> Iterator[None]:
    """Has robosuite take compiled models from ``compiler`` and make no OpenGL context."""
    from robosuite.environments import base
    from robosuite.utils.binding_utils import MjSim

    def simulation(xml: str) -> Any:
        return MjSim(copy.copy(compiler(xml)[1]))

    with (
        mock.patch.object(base, "MjRenderContextOffscreen", _NoRenderContext),
        mock.patch.object(MjSim, "from_xml_string", staticmethod(simulation)),
    ):
        yield


def _robot_arrays(domain: Any) -> dict[str, np.ndarray]:
    """Fields of ``control.Robot``."""
    robot, model = domain.robots[0], domain.sim.model
    controller = robot.controller
    fingers = [model.actuator_name2id(name) for name in robot.gripper.actuators]
    ranges = model.actuator_ctrlrange[fingers]
    low, high = robot.torque_limits
    return {
        "arm_qpos": np.array(robot._ref_joint_pos_indexes, dtype=np.int64),
        "arm_qvel": np.array(robot._ref_joint_vel_indexes, dtype=np.int64),
        "arm_ctrl": np.array(robot._ref_joint_actuator_indexes, dtype=np.int64),
        "gripper_ctrl": np.array(fingers, dtype=np.int64),
        "site": np.array([robot.eef_site_id], dtype=np.int64),
        "kp": np.array(controller.kp, dtype=np.float64),
        "kd": np.array(controller.kd, dtype=np.float64),
        "torque_low": np.array(low),
        "torque_high": np.array(high),
        "gripper_bias": 0.5 * (ranges[:, 1] + ranges[:, 0]),
        "gripper_weight": 0.5 * (ranges[:, 1] - ranges[:, 0]),
        "posture": np.array(controller.initial_joint),
    }


def _arm_arrays(domain: Any) -> dict[str, np.ndarray]:
    """Fields of ``control.ArmState`` as the reset left them."""
    robot = domain.robots[0]
    controller = robot.controller
    return {
        "stale": np.array([0 if controller.new_update else 1], dtype=np.int64),
        "goal_pos": np.array(controller.goal_pos),
        "goal_ori": np.array(controller.goal_ori),
        "gripper": np.zeros(2) + robot.gripper.current_action,
        "ee_pos": np.array(controller.ee_pos),
        "ee_ori": np.array(controller.ee_ori_mat),
        "ee_vel": np.concatenate([controller.ee_pos_vel, controller.ee_ori_vel]),
        "joint_pos": np.array(controller.joint_pos),
        "joint_vel": np.array(controller.joint_vel),
        "jacobian": np.ascontiguousarray(controller.J_full.T),
        "mass": np.ascontiguousarray(controller.mass_matrix.T),
    }


def _state_arrays(domain: Any) -> dict[str, np.ndarray]:
    """Return what else the reset left in the model and in the data."""
    model, data = domain.sim.model._model, domain.sim.data._data
    return {
        "body_pos": model.body_pos.copy(),
        "body_quat": model.body_quat.copy(),
        "site_rgba": model.site_rgba.copy(),
        "qacc_warmstart": data.qacc_warmstart.copy(),
        "ctrl": data.ctrl.copy(),
    }


def _burners(domain: Any) -> Iterator[Burner]:
    for name in domain.visualization_sites_list:
        item = domain.get_object(name)
        threshold = min(item.object_properties["articulation"]["default_turnon_ranges"])
        for site_name, _ in item.object_properties["vis_site_names"].values():
            yield Burner(domain.sim.model.site_name2id(site_name), _addresses(domain, item.joints), float(threshold))


def _predicate(domain: Any, state: Sequence[str]) -> Predicate:
    """Compiles one condition, such as ``("on", "bowl_1", "plate_1")``, to indices.

    The names are those of ``libero.libero.envs.predicates``; what they mean is in ``envs/object_states``.
    """
    name, *arguments = state
    name = name.lower()
    subject = domain.object_states_dict[arguments[0]]
    if name in _JOINT_TESTS and len(arguments) == 1:
        return _joint_predicate(domain, name, subject)
    if name in ("on", "in") and len(arguments) == 2 and subject.object_state_type == "object":
        target = domain.object_states_dict[arguments[1]]
        body = int(domain.obj_body_id[arguments[0]])
        moved = domain.get_object(arguments[0])
        if target.object_state_type == "object" and name == "on":
            return Predicate(
                "on_object",
                body=body,
                target_body=int(domain.obj_body_id[arguments[1]]),
                geoms=_geoms(domain, moved),
                target_geoms=_geoms(domain, domain.get_object(arguments[1])),
            )
        if target.object_state_type == "site":
            site = domain.object_sites_dict[arguments[1]]
            parent = domain.get_object(target.parent_name) if name == "on" else None
            return Predicate(
                f"{name}_site",
                body=body,
                site=domain.sim.model.site_name2id(arguments[1]),
                size=tuple(map(float, site.size)),
                geoms=_geoms(domain, moved) if parent is not None else (),
                target_geoms=_geoms(domain, parent) if parent is not None else (),
            )
    raise UserError(
        f"The goal condition ({' '.join(state)}) of {domain.bddl_file_name} is not known: allowed are On and In of an "
        f"object, and {', '.join(sorted(_JOINT_TESTS))} of a fixture or of a part of one. Use StockSimulator for it."
    )


#: Method of an articulated object by predicate, and whether every joint must pass it.
_JOINT_TESTS = {
    "open": ("is_open", False),
    "close": ("is_close", True),
    "turnon": ("turn_on", False),
    "turnoff": ("turn_off", True),
}


def _joint_predicate(domain: Any, name: str, subject: Any) -> Predicate:
    method, every = _JOINT_TESTS[name]
    is_site = subject.object_state_type == "site"
    item = domain.get_object(subject.parent_name if is_site else subject.object_name)
    joints = domain.object_sites_dict[subject.object_name].joints if is_site else item.joints
    ranges = item.object_properties["articulation"]
    limits = sorted({float(limit) for bounds in ranges.values() for limit in bounds})
    comparison, threshold = _threshold(getattr(item, method), limits)
    return Predicate("joints", qpos=_addresses(domain, joints), comparison=comparison, threshold=threshold, every=every)


def _threshold(test: Callable[[float], bool], limits: Sequence[float]) -> tuple[str, float]:
    """Find the comparison that an object's test of a joint position makes, by trying it around all its limits."""
    probes = [probe for limit in limits for probe in (np.nextafter(limit, -np.inf), limit, np.nextafter(limit, np.inf))]
    answers = [bool(test(float(probe))) for probe in probes]
    for threshold in limits:
        for symbol, compare in COMPARISONS.items():
            if answers == [bool(compare(probe, threshold)) for probe in probes]:
                return symbol, threshold
    raise UserError(f"{test} is not a comparison with one of its limits {limits}. Use StockSimulator for this task.")


def _geoms(domain: Any, item: Any) -> tuple[int, ...]:
    return _ints(domain.sim.model.geom_name2id(name) for name in item.contact_geoms)


def _addresses(domain: Any, joints: Sequence[str]) -> tuple[int, ...]:
    return _ints(domain.sim.model.get_joint_qpos_addr(joint) for joint in joints)


def _ints(values: Any) -> tuple[int, ...]:
    return tuple(int(value) for value in values)
