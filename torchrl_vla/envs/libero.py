"""LIBERO as a TorchRL environment with the keys of TorchRL's vision-language-action layout."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from tensordict import NonTensorData, NonTensorStack, TensorDict, TensorDictBase
from torchrl.envs import EnvBase

from torchrl_vla.envs.installation import warn_about_mujoco_version
from torchrl_vla.envs.proprio import PROPRIO_FORMATS
from torchrl_vla.envs.rendering import configure_rendering
from torchrl_vla.envs.schedule import EpisodeSchedule
from torchrl_vla.envs.specs import ACTION_DIM, CAMERAS, STATE_DIM, image_key, make_specs
from torchrl_vla.envs.tasks import get_suite
from torchrl_vla.errors import UserError

__all__ = ["LiberoEnv"]


class Simulator(Protocol):
    """What ``LiberoEnv`` needs of a simulator; see ``LiberoSimulator`` for the meaning of each."""

    def reset(self, slot: int, task_id: int, init_state_id: int) -> None: ...

    def step(self, slot: int, actions: np.ndarray) -> tuple[int, bool]: ...

    def low_dim(self, slot: int) -> dict[str, np.ndarray]: ...

    def render(self, slot: int, camera: str) -> np.ndarray: ...

    def close(self) -> None: ...


class LiberoEnv(EnvBase):
    """Tasks of a LIBERO suite, one decision (a chunk of control steps at 20 Hz) per step.

    The chunk runs inside the step, stops at the control step at which the task succeeds and is cut at the horizon, so
    the terminal reward is never lost. ``terminated`` means success, ``truncated`` that the horizon was reached
    without. The reward is ``reward_scale`` at success, else 0. A slot that is done, or that a ``"_step"`` mask leaves
    out, does nothing: its observation stays, its reward and ``"num_control_steps"`` are 0. (Where a mask leaves out a
    whole worker of a ``ParallelEnv``, TorchRL repeats what stood there instead.)

    With ``B`` the batch size (``[]``, or ``[num_envs]``), ``K`` the chunk size and ``H`` the image size:

    ==================================== ============================= =============================================
    key
    ==================================== ============================= =============================================
    ``("observation", "image")``         uint8 ``[*B, 3, H, H]``       first camera, upright
    ``("observation", "wrist_image")``   uint8 ``[*B, 3, H, H]``       camera ``robot0_eye_in_hand``, if not first;
                                                                       further cameras are ``<name>_image``
    ``("observation", "state")``         float32 ``[*B, 8]``           see ``proprio_format``
    ``"task_id"``, ``"init_state_id"``   int64 ``[*B, 1]``             what the episode runs; may be set at reset
    ``"language_instruction"``           str                           the task in words
    ``"success"``                        bool ``[*B, 1]``              whether the task has succeeded
    ``"num_control_steps"``              int64 ``[*B, 1]``             control steps run by this step, 0 at reset
    ``"action"``                         float32 ``[*B, K, 7]``        end effector motion (3), rotation (3), gripper
                                                                       (-1 open, +1 close), in -1..1; ``[*B, 7]``
                                                                       when ``chunk_size=1``
    ==================================== ============================= =============================================

    ``reset`` takes the task and the initial state from its tensordict (keys ``"task_id"`` and ``"init_state_id"``) or
    from keyword arguments of these names (an integer, or one per slot; ``list_of_kwargs`` works as in TorchRL's
    batched environments). What is not given is chosen by ``task_ids`` and ``init_state_mode``.

    Nothing is simulated and no OpenGL context is made before the first reset, so the environment can be made anywhere
    and pickled to a worker: ``ParallelEnv(4, functools.partial(LiberoEnv, "libero_spatial"),
    create_env_kwargs=[{"shard": (i, 4)} for i in range(4)])``.

    Args:
        task_suite: name of a suite of LIBERO or LIBERO-PRO, see :func:`~torchrl_vla.envs.tasks.suite_names`.
        task_id: the task to run, if ``task_ids`` is not given.

    Keyword Args:
        task_ids: tasks to run in turn, one per reset of a slot.
        num_envs: ``None`` for an environment without batch dimension, or the number of slots, all in this process.
        chunk_size: control steps per step, ``K``.
        image_size: height and width of the pictures in pixels, ``H``.
        cameras: names out of :data:`~torchrl_vla.envs.specs.CAMERAS`.
        proprio_format: ``"axis_angle"`` (OpenVLA-OFT's) or ``"quaternion"``, see :mod:`torchrl_vla.envs.proprio`.
        max_episode_steps: control steps until truncation; ``None`` for the suite's horizon.
        settle_steps: control steps without motion, not counted, before the first observation.
        init_state_mode: ``"cycle"`` (each task's initial states in turn), ``"random"`` or ``"fixed"``.
        init_state_id: the first initial state of the cycle, or the fixed one.
        reward_scale: reward of a success.
        fidelity: ``"exact"`` (the same bits as stock LIBERO) or ``"fast"``.
        include_instruction: whether to write ``"language_instruction"``. TorchRL sends strings between processes apart
            from the shared memory; :class:`~torchrl_vla.envs.InstructionFromTaskId` adds it outside of ``ParallelEnv``.
        seed: seed of the random initial states, and of the fixtures' poses (``None``: the evaluation protocol's 0).
            ``set_seed`` changes the former only: an initial state stays the same in all workers.
        sampled_init_states: start from states drawn from the tasks' regions with this seed, as many as there are
            official ones and numbered from 0 too, none of them official; ``None`` for the official ones.
        max_models: compiled models, 0.4 to 1.1 GB each with its render context, that are kept; ``None`` for all that
            tasks have needed. :func:`~torchrl_vla.envs.factory.make_env` chooses it.
        shard: number of this environment among so many that share the episodes that are not named at reset: without
            it, all workers of a ``ParallelEnv`` run the same ones. :func:`~torchrl_vla.envs.factory.make_env` sets it.
        device: device of the tensordicts.

    Raises:
        ValueError: an argument is out of its range; the message says what is allowed.
        ImportError: LIBERO is not installed.
        RuntimeError: there is no OpenGL to render with.

    Examples:
        >>> env = LiberoEnv("libero_spatial", task_ids=[0, 3], num_envs=2)  # doctest: +SKIP
        >>> env.rollout(3)["next", "num_control_steps"].squeeze(-1)  # doctest: +SKIP
        tensor([[8, 8, 8],
                [8, 8, 8]])
    """

    def __init__(
        self,
        task_suite: str = "libero_spatial",
        task_id: int = 0,
        *,
        task_ids: Sequence[int] | None = None,
        num_envs: int | None = None,
        chunk_size: int = 8,
        image_size: int = 256,
        cameras: Sequence[str] = ("agentview",),
        proprio_format: str = "axis_angle",
        max_episode_steps: int | None = None,
        settle_steps: int = 10,
        init_state_mode: str = "cycle",
        init_state_id: int = 0,
        reward_scale: float = 1.0,
        fidelity: str = "exact",
        include_instruction: bool = True,
        seed: int | None = None,
        sampled_init_states: int | None = None,
        max_models: int | None = None,
        shard: tuple[int, int] = (0, 1),
        device: torch.device | str | None = None,
    ) -> None:
        suite = get_suite(task_suite)
        max_episode_steps = suite.horizon if max_episode_steps is None else max_episode_steps
        sizes = {"chunk_size": chunk_size, "image_size": image_size, "max_episode_steps": max_episode_steps}
        sizes |= {
            "num_envs": 1 if num_envs is None else num_envs,
            "max_models": 1 if max_models is None else max_models,
        }
        for name, size in sizes.items():
            if size < 1:
                raise UserError(f"{name} must be at least 1, got {size}.")
        if settle_steps < 0:
            raise UserError(f"settle_steps must not be negative, got {settle_steps}.")
        if not (np.isfinite(reward_scale) and reward_scale > 0):
            raise UserError(f"reward_scale must be positive and finite, got {reward_scale}.")
        if proprio_format not in PROPRIO_FORMATS:
            raise UserError(f"proprio_format must be one of {', '.join(PROPRIO_FORMATS)}, got {proprio_format!r}.")
        if sampled_init_states is not None and sampled_init_states < 0:
            raise UserError(f"sampled_init_states must be a seed, 0 or more, got {sampled_init_states}.")
        if fidelity not in ("exact", "fast"):
            raise UserError(f"fidelity must be 'exact' or 'fast', got {fidelity!r}.")
        if isinstance(cameras, str) or not cameras or len(set(cameras)) != len(cameras) or set(cameras) - set(CAMERAS):
            raise UserError(f"cameras must be different names out of {', '.join(CAMERAS)}, got {cameras!r}.")
        schedule = EpisodeSchedule(
            suite,
            (task_id,) if task_ids is None else tuple(task_ids),
            init_state_mode=init_state_mode,
            init_state_id=init_state_id,
            seed=seed,
            shard=shard,
        )
        warn_about_mujoco_version()
        configure_rendering()
        batch_size = torch.Size([] if num_envs is None else [num_envs])
        super().__init__(device=device, batch_size=batch_size)
        self.suite = suite
        self.chunk_size = chunk_size
        self.max_episode_steps = max_episode_steps
        self.reward_scale = reward_scale
        self._schedule = schedule
        self._proprio = PROPRIO_FORMATS[proprio_format]
        self._image_keys = {camera: image_key(camera, first=camera == cameras[0]) for camera in cameras}
        self._include_instruction = include_instruction
        self._simulator: Simulator | None = None
        self._simulator_arguments: dict[str, Any] = {
            "num_slots": sizes["num_envs"],
            "image_size": image_size,
            "cameras": tuple(cameras),
            "settle_steps": settle_steps,
            "fidelity": fidelity,
            "seed": 0 if seed is None else seed,
            "sampled_init_states": sampled_init_states,
            "max_models": max_models,
        }
        specs = make_specs(
            batch_size=batch_size,
            device=self.device,
            image_keys=self._image_keys.values(),
            image_size=image_size,
            chunk_size=chunk_size,
            num_tasks=len(suite.tasks),
            include_instruction=include_instruction,
        )
        self.observation_spec, self.state_spec, self.action_spec, self.reward_spec, self.done_spec = specs
        self._make_slots(sizes["num_envs"], image_size)

    @property
    def num_slots(self) -> int:
        """Number of episodes that run side by side in this process."""
        return len(self._steps)

    def close(self, *, raise_if_closed: bool = True) -> None:
        """Frees the simulator and its OpenGL contexts; may be called again, and a reset makes new ones."""
        if self._simulator is not None:
            self._finalizer()
            self._simulator = None
            self._started = [False] * self.num_slots
        super().close(raise_if_closed=raise_if_closed)

    def _make_slots(self, num_slots: int, image_size: int) -> None:
        """Return the slots' last outputs, which a slot that does not step gives again."""
        picture = (num_slots, 3, image_size, image_size)
        # NumPy copies them faster than PyTorch, which would wake its threads for each.
        self._images = {key: np.zeros(picture, dtype=np.uint8) for key in self._image_keys.values()}
        self._states = torch.zeros(num_slots, STATE_DIM)
        self._task_ids = torch.zeros(num_slots, 1, dtype=torch.int64)
        self._init_state_ids = torch.zeros(num_slots, 1, dtype=torch.int64)
        self._terminated = torch.zeros(num_slots, 1, dtype=torch.bool)
        self._truncated = torch.zeros(num_slots, 1, dtype=torch.bool)
        self._steps = [0] * num_slots
        self._started = [False] * num_slots
        self._instructions = self._gather_instructions()

    def _reset(
        self,
        tensordict: TensorDictBase | None = None,
        *,
        task_id: int | Sequence[int] | None = None,
        init_state_id: int | Sequence[int] | None = None,
        list_of_kwargs: Sequence[Mapping[str, int]] | None = None,
    ) -> TensorDictBase:
        if list_of_kwargs is not None:
            unknown = {name for own in list_of_kwargs for name in own} - {"task_id", "init_state_id"}
            if unknown or len(list_of_kwargs) != self.num_slots:
                raise UserError(
                    f"list_of_kwargs needs {self.num_slots} dictionaries (one per slot) with 'task_id' and "
                    f"'init_state_id' or neither, got {list(list_of_kwargs)}."
                )
        task_ids = self._requested("task_id", task_id, list_of_kwargs, tensordict)
        init_state_ids = self._requested("init_state_id", init_state_id, list_of_kwargs, tensordict)
        # All choices are made, and checked, before any slot changes.
        chosen = {
            slot: self._schedule.next(task_ids[slot], init_state_ids[slot])
            for slot in self._selected_slots(tensordict, "_reset")
        }
        simulator = self._get_simulator()
        for slot, (task, init_state) in chosen.items():
            simulator.reset(slot, task, init_state)
            self._task_ids[slot], self._init_state_ids[slot] = task, init_state
            self._terminated[slot] = self._truncated[slot] = False
            self._steps[slot], self._started[slot] = 0, True
            self._observe(simulator, slot)
        self._instructions = self._gather_instructions()
        return self._output(torch.zeros(self.num_slots, 1, dtype=torch.int64))

    def _reset_proc_data(self, tensordict: TensorDictBase | None, tensordict_reset: TensorDictBase) -> TensorDictBase:
        if tensordict is None:
            return super()._reset_proc_data(tensordict, tensordict_reset)
        # TorchRL chooses by a mask, pixel by pixel, between what was reset and what goes on. Of the latter, too, the
        # pictures are in `tensordict_reset` already.
        pictures = [("observation", key) for key in self._image_keys.values()]
        shown = tensordict_reset.select(*pictures)
        rest = tensordict.exclude(*pictures, inplace=True)
        return super()._reset_proc_data(rest, tensordict_reset.exclude(*pictures)).update(shown)

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        slots = [slot for slot in self._selected_slots(tensordict, "_step") if self._running(slot)]
        actions = self._read_actions(tensordict, slots)
        simulator = self._get_simulator()
        num_control_steps = torch.zeros(self.num_slots, 1, dtype=torch.int64)
        reward = torch.zeros(self.num_slots, 1)
        for slot in slots:
            steps_left = self.max_episode_steps - self._steps[slot]
            steps_run, success = simulator.step(slot, actions[slot, :steps_left])
            self._steps[slot] += steps_run
            num_control_steps[slot] = steps_run
            reward[slot] = self.reward_scale * success
            self._terminated[slot] = success
            self._truncated[slot] = not success and self._steps[slot] >= self.max_episode_steps
            self._observe(simulator, slot)
        return self._output(num_control_steps, reward)

    def _set_seed(self, seed: int | None) -> None:
        self._schedule.set_seed(seed)

    def _get_simulator(self) -> Simulator:
        if self._simulator is None:
            # Not before now: it imports MuJoCo, whose OpenGL backend the constructor has chosen.
            from torchrl_vla.envs.simulation.simulator import LiberoSimulator

            self._simulator = LiberoSimulator(self.suite.name, **self._simulator_arguments)
            # At interpreter exit too, while OpenGL can still be called.
            self._finalizer = weakref.finalize(self, self._simulator.close)
            self.is_closed = False
        return self._simulator

    def _running(self, slot: int) -> bool:
        if not self._started[slot]:
            raise RuntimeError(f"{self._name(slot)} has no episode: call reset() before step().")
        return not (self._terminated[slot] or self._truncated[slot])

    def _name(self, slot: int) -> str:
        where = "" if self.batch_size == torch.Size([]) else f" slot {slot}"
        return f"LiberoEnv({self.suite.name}){where}"

    def _selected_slots(self, tensordict: TensorDictBase | None, mask_key: str) -> list[int]:
        mask = None if tensordict is None else tensordict.get(mask_key, None)
        if mask is None:
            return list(range(self.num_slots))
        return mask.reshape(self.num_slots, -1).any(-1).nonzero().flatten().tolist()

    def _requested(
        self,
        name: str,
        argument: int | Sequence[int] | None,
        list_of_kwargs: Sequence[Mapping[str, int]] | None,
        tensordict: TensorDictBase | None,
    ) -> list[int | None]:
        """Return what is asked of each slot: in its own arguments, else in all slots', else in the tensordict."""
        if argument is None and tensordict is not None and name in tensordict:
            argument = tensordict.get(name).cpu()
        requested: list[int | None] = [None] * self.num_slots
        if argument is not None:
            values = np.asarray(argument).reshape(-1)
            if values.dtype.kind not in "iu" or values.size not in (1, self.num_slots):
                raise UserError(f"{name} must be an integer, or one per slot ({self.num_slots}), got {argument}.")
            requested = np.broadcast_to(values, self.num_slots).tolist()
        if list_of_kwargs is not None:
            requested = [own.get(name, value) for own, value in zip(list_of_kwargs, requested, strict=True)]
        return requested

    def _read_actions(self, tensordict: TensorDictBase, slots: list[int]) -> np.ndarray:
        action = tensordict.get("action")
        expected = self.action_spec.shape
        if action.shape != expected:
            raise UserError(
                f"LiberoEnv({self.suite.name}) takes actions of shape {list(expected)} (batch, control steps of a "
                f"chunk unless chunk_size=1, {ACTION_DIM}), got {list(action.shape)}."
            )
        actions = action.detach().to("cpu", torch.float64).reshape(self.num_slots, self.chunk_size, ACTION_DIM).numpy()
        for slot in slots:
            if not np.isfinite(actions[slot]).all():
                step, dim = np.argwhere(~np.isfinite(actions[slot]))[0]
                raise UserError(
                    f"{self._name(slot)} got {actions[slot, step, dim]} in dimension {dim} of control step {step} of "
                    "its action: actions must be finite, in -1..1 (what lies outside is clipped)."
                )
        return actions

    def _observe(self, simulator: Simulator, slot: int) -> None:
        self._states[slot] = torch.from_numpy(self._proprio(simulator.low_dim(slot)))
        for camera, key in self._image_keys.items():
            # A rotation by 180 degrees, then channels first.
            self._images[key][slot] = simulator.render(slot, camera)[::-1, ::-1].transpose(2, 0, 1)

    def _output(self, num_control_steps: torch.Tensor, reward: torch.Tensor | None = None) -> TensorDict:
        """All slots' entries as new tensors, without the batch dimension if there is none."""
        entries: dict[str, Any] = {
            "task_id": self._task_ids.clone(),
            "init_state_id": self._init_state_ids.clone(),
            "success": self._terminated.clone(),
            "num_control_steps": num_control_steps,
            "done": self._terminated | self._truncated,
            "terminated": self._terminated.clone(),
            "truncated": self._truncated.clone(),
        }
        observation = {key: torch.from_numpy(images.copy()) for key, images in self._images.items()}
        observation["state"] = self._states.clone()
        if reward is not None:
            entries["reward"] = reward
        if not self.batch_size:
            entries = {key: value[0] for key, value in entries.items()}
            observation = {key: value[0] for key, value in observation.items()}
        entries["observation"] = TensorDict(observation, batch_size=self.batch_size)
        if self._include_instruction:
            entries["language_instruction"] = self._instructions
        output = TensorDict(entries, batch_size=self.batch_size)
        return output if self.device is None else output.to(self.device)

    def _gather_instructions(self) -> NonTensorData | NonTensorStack:
        texts = [self.suite.tasks[task_id].instruction for task_id in self._task_ids.flatten().tolist()]
        return NonTensorStack(*texts) if self.batch_size else NonTensorData(texts[0], batch_size=[])

    def __getstate__(self) -> dict[str, Any]:
        """Leaves the simulator behind: in another process a reset makes a new one."""
        state = super().__getstate__()
        state.pop("_finalizer", None)
        return {**state, "_simulator": None, "_started": [False] * self.num_slots}


# TorchRL's metaclass takes any arguments and hides the constructor's from help() and editors.
LiberoEnv.__signature__ = inspect.signature(
    LiberoEnv.__init__
).replace(  # type: ignore[attr-defined]
    parameters=list(inspect.signature(LiberoEnv.__init__).parameters.values())[1:]
)
