"""The shapes and types of ``LiberoEnv``'s entries."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torchrl.data import Bounded, Categorical, Composite, NonTensor, Unbounded

__all__ = ["ACTION_DIM", "CAMERAS", "STATE_DIM", "LiberoSpecs", "image_key", "make_specs"]

#: The cameras that every LIBERO scene has.
CAMERAS = (
    "agentview",
    "robot0_eye_in_hand",
    "frontview",
    "birdview",
    "sideview",
    "galleryview",
    "robot0_robotview",
)
ACTION_DIM = 7
STATE_DIM = 8


class LiberoSpecs(NamedTuple):
    """The specs of an environment, by TorchRL's names."""

    observation: Composite
    state: Composite
    action: Bounded
    reward: Unbounded
    done: Composite


def image_key(camera: str, *, first: bool) -> str:
    """Return the key below ``"observation"`` under which a camera's pictures stand."""
    if first:
        return "image"
    return "wrist_image" if camera == "robot0_eye_in_hand" else f"{camera}_image"


def make_specs(
    *,
    batch_size: torch.Size,
    device: torch.device | None,
    image_keys: Iterable[str],
    image_size: int,
    chunk_size: int,
    num_tasks: int,
    include_instruction: bool,
) -> LiberoSpecs:
    """Build the specs.

    Args:
        batch_size: ``B``.
        device: device of the entries.
        image_keys: keys of the pictures below ``"observation"``, each uint8 ``[*B, 3, image_size, image_size]``.
        image_size: height and width of the pictures.
        chunk_size: control steps per action; 1 has no dimension of its own.
        num_tasks: number of tasks in the suite.
        include_instruction: whether observations hold ``"language_instruction"``.
    """

    def flag() -> Categorical:
        return Categorical(2, shape=(*batch_size, 1), dtype=torch.bool, device=device)

    def count() -> Unbounded:
        return Unbounded(shape=(*batch_size, 1), dtype=torch.int64, device=device)

    def task() -> Bounded:
        return Bounded(0, num_tasks - 1, shape=(*batch_size, 1), dtype=torch.int64, device=device)

    def composite(**entries: object) -> Composite:
        return Composite(**entries, shape=batch_size, device=device)

    picture = (*batch_size, 3, image_size, image_size)
    images = {key: Bounded(0, 255, shape=picture, dtype=torch.uint8, device=device) for key in image_keys}
    observation = composite(
        observation=composite(**images, state=Unbounded(shape=(*batch_size, STATE_DIM), device=device)),
        task_id=task(),
        init_state_id=count(),
        success=flag(),
        num_control_steps=count(),
    )
    if include_instruction:
        observation["language_instruction"] = NonTensor(shape=batch_size, example_data="", device=device)
    chunk = () if chunk_size == 1 else (chunk_size,)
    return LiberoSpecs(
        observation=observation,
        # Declared as state, the two reach the environment through TransformedEnv and the buffers of ParallelEnv.
        state=composite(task_id=task(), init_state_id=count()),
        action=Bounded(-1.0, 1.0, shape=(*batch_size, *chunk, ACTION_DIM), device=device),
        reward=Unbounded(shape=(*batch_size, 1), device=device),
        done=composite(done=flag(), terminated=flag(), truncated=flag()),
    )
