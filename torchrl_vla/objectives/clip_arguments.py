"""Arguments of the clipped objective: what each may be, and which of TorchRL's ``ClipPPOLoss`` it does not take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torchrl.objectives import LossModule

from torchrl_vla.errors import UserError

#: Arguments of ClipPPOLoss that are not taken -> the value that asks for nothing, and what to do instead.
_NOT_TAKEN: dict[str, tuple[Any, str]] = {
    "functional": (False, "the networks are used as they are, so that adapters and sharding stay in place"),
    "delay_actor": (False, "it needs functional=True, which this loss does not have"),
    "max_importance_ratio": (None, "use dual_clip, which bounds what a large ratio can do"),
    "gamma": (None, "call make_value_estimator(gamma=...), or compute the advantage with GAE(gamma=...)"),
    "advantage_key": (None, "call set_keys(advantage=...)"),
    "value_target_key": (None, "call set_keys(value_target=...)"),
    "value_key": (None, "call set_keys(value=...)"),
    "critic_coef": (None, "it is called critic_coeff"),
    "entropy_coef": (None, "it is called entropy_coeff"),
}


#: Coefficients -> the attribute that says whether the loss has their term.
_SWITCHES = {
    "entropy_coeff": "entropy_bonus",
    "kl_coeff": "_has_kl",
    "reconstruction_coeff": "_has_reconstruction",
    "critic_coeff": "_has_critic",
}


class SwitchedCoefficients(LossModule):
    """Coefficients that bring their term in when they are raised from 0, by assignment or by loading a state."""

    def __setattr__(self, name: str, value: Any) -> None:
        """Assign; refuse a coefficient whose term the loss cannot compute."""
        if name == "reduction":
            check_choice(name, value, ("mean", "sum", "none"))
        if name not in _SWITCHES or value is None or not self.__dict__.get("_switches_are_live", False):
            super().__setattr__(name, value)
            return
        check_coefficient(name, value)
        if value > 0:
            lacking = self._lacking(name)
            if lacking is not None:
                raise UserError(f"{name}={float(value)} needs {lacking}, which this loss was built without.")
            setattr(self, _SWITCHES[name], True)
        if self._buffers.get(name) is None:
            # TorchRL keeps no buffer for a critic's coefficient of 0.
            self.__dict__.pop(name, None)
            self.register_coeff_buffer(name, value, device=self.entropy_coeff.device)
        else:
            super().__setattr__(name, value)

    def _lacking(self, coefficient: str) -> str | None:
        """Return what the term of a coefficient needs and the loss has not."""
        raise NotImplementedError

    def _make_switches_live(self) -> None:
        """Watch assignments from here on."""
        self._switches_are_live = True
        self.register_load_state_dict_post_hook(_switch_on_loaded)


def _switch_on_loaded(loss: nn.Module, _: Any) -> None:
    for name in _SWITCHES:
        value = loss._buffers.get(name)
        if value is not None:
            setattr(loss, name, value.item())


def refuse_not_taken(arguments: Mapping[str, Any]) -> None:
    """Refuse arguments of TorchRL's ``ClipPPOLoss`` that have no meaning here, unless they ask for nothing.

    Raises:
        TypeError: naming the argument, and what to do instead.
    """
    for name, value in arguments.items():
        if name not in _NOT_TAKEN:
            raise TypeError(f"AsymmetricClipPPOLoss has no argument {name!r}.")
        neutral, instead = _NOT_TAKEN[name]
        if value is not neutral:
            raise TypeError(f"AsymmetricClipPPOLoss does not take {name}={value!r}: {instead}.")


def check_clip_bounds(low: float, high: float) -> None:
    """Refuse clip ratios that bound nothing.

    Raises:
        ValueError: naming the ratio.
    """
    if not 0 < low < 1:
        raise UserError(f"clip_ratio_low={low} must lie in (0, 1): the lower bound is 1 - it.")
    if not high > 0:
        raise UserError(f"clip_ratio_high={high} must be positive: the upper bound is 1 + it.")


def check_choice(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """Refuse a word that is not one of those known.

    Raises:
        ValueError: naming the argument and what is allowed.
    """
    if value not in allowed:
        raise UserError(f"{name}={value!r} is unknown: choose one of {allowed}.")


def check_coefficient(name: str, value: Any) -> None:
    """Refuse the weight of a term that is not a number, or negative.

    Raises:
        ValueError: naming the coefficient.
    """
    if not isinstance(value, int | float | Tensor) or isinstance(value, bool):
        raise UserError(f"{name}={value!r} must be one number: 0 leaves the term out.")
    if not value >= 0:
        raise UserError(f"{name}={value} must not be negative: 0 leaves the term out.")
