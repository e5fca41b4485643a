"""AdamW whose moments lie in the host's memory ([Note: Offloaded moments] in planner/offload.py)."""

from __future__ import annotations

from typing import Any

import torch

from planner.plan import Plan
from profiles.input_error import InputError

from .local_parameters import local_part, with_local

_MOMENTS = ("exp_avg", "exp_avg_sq")


def check_offload(plan: Plan, device_type: str) -> None:
    """Raise an InputError where the plan's offload has no device to spare."""
    if plan.job.offload != "none" and device_type != "cuda":
        raise InputError(
            "the plan keeps optimizer state in the host's memory",
            where="plan: job.offload",
            expected="a CUDA device beside the host",
            got=f"ranks on the {device_type.upper()}, whose memory is the host's",
            hint="plan again for this machine, or leave job.offload out",
        )


class OffloadedAdamW(torch.optim.AdamW):
    """Fused AdamW; each parameter's moments come to its device for its update alone.

    Copies and update are issued in order on the device's stream, so the host does not wait; whoever reads moments must
    have waited for the device, as a step does at its end. Where parameters lie on the CPU host and device are one.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        for parameter in (parameter for group in self.param_groups for parameter in group["params"]):
            local = local_part(parameter)
            self.state[parameter]["step"] = torch.zeros((), dtype=torch.float32, device=local.device)
            for moment in _MOMENTS:
                host = torch.zeros(local.shape, dtype=local.dtype, pin_memory=local.is_cuda)
                self.state[parameter][moment] = with_local(parameter, host)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        assert closure is None
        groups = self.param_groups
        try:
            for group in groups:
                for parameter in group["params"]:
                    self._update_one(group, parameter)
        finally:
            self.param_groups = groups

    def _update_one(self, group: dict[str, Any], parameter: torch.Tensor) -> None:
        state, device = self.state[parameter], local_part(parameter).device
        hosts = {moment: state[moment] for moment in _MOMENTS}
        for moment, host in hosts.items():
            state[moment] = with_local(parameter, local_part(host).to(device, non_blocking=True))
        self.param_groups = [group | {"params": [parameter]}]
        super().step()
        for moment, host in hosts.items():
            local_part(host).copy_(local_part(state[moment]), non_blocking=True)
            state[moment] = host
