"""torch.amp.GradScaler and a step of two halves.

The scaler keeps one stage for each optimizer and step: ready, unscaled, stepped. Two halves need it twice, which its
public interface has no word for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import OptState, _refresh_per_optimizer_state
from torch.optim import Optimizer

from ..quant.sharding import local_part


def _unscaled(scaler: Any, optimizer: Optimizer) -> dict[str, Any]:
    """The scaler's state of the optimizer, whose gradients are unscaled unless that is done."""
    if scaler._per_optimizer_states[id(optimizer)]["stage"] is OptState.READY:
        scaler.unscale_(optimizer)
    return scaler._per_optimizer_states[id(optimizer)]


def unscale_first(scaler: Any, optimizer: Optimizer) -> Tensor | None:
    """Unscales the first gradients unless that is done, and makes the scaler ready for the second; what it found."""
    if scaler is None or not scaler.is_enabled():
        return None
    found = list(_unscaled(scaler, optimizer)["found_inf_per_device"].values())
    scaler._per_optimizer_states[id(optimizer)] = _refresh_per_optimizer_state()
    return torch.stack([f.to(found[0].device) for f in found]).sum() if found else None


def unscale_second(scaler: Any, optimizer: Optimizer, first_found: Tensor | None) -> bool:
    """Unscales the second gradients unless that is done; whether either half had inf or NaN. Waits, as GradScaler does.

    The first half's finding is put beside the second's, so that ``scaler.update()`` lowers the scale for both.
    """
    found = getattr(optimizer, "found_inf", None)  # set while GradScaler.step(optimizer) calls step()
    if found is not None:
        if (scale := optimizer.grad_scale) is not None:  # type: ignore[attr-defined]
            inverse = scale.double().reciprocal().float()
            for p in (p for group in optimizer.param_groups for p in group["params"]):
                if p.grad is not None:
                    local_part(p.grad).mul_(inverse.to(p.grad.device))
    elif scaler is not None and scaler.is_enabled():
        state = _unscaled(scaler, optimizer)
        found, state["stage"] = sum(state["found_inf_per_device"].values()), OptState.STEPPED
    else:
        return False
    if first_found is not None and scaler is not None:
        for f in scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"].values():
            f += first_found.to(f.device)
        found = found + first_found.to(found.device)
    return bool(found.item() if isinstance(found, Tensor) else found)
