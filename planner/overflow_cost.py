"""Seconds of what fp16 adds to a step's end: gradients looked at for what is not finite, as each trainer does it.

Operations are those of NVIDIA/Megatron-LM: fp16/loss_scaler.py (_has_inf_or_nan: float(x.float().sum())), mpu/grads.py
(param_norm.item()), fp16/fp16util.py and fp16/fp16.py (copies, products and zero_grad of one tensor each). The kernel
over all gradients is torch's _amp_foreach_non_finite_check_and_unscale_.
"""

from __future__ import annotations

from profiles.hardware import HardwareProfile
from profiles.software import Software

_SUM_OPERATIONS = 3  # cast to fp32, sum, a number read
_NORM_OPERATIONS = 2  # norm, a number read
_LOOP_OPERATIONS = 4  # gradient to the master copy, unscaled, clipped, weight back
_ZERO_OPERATIONS = 4  # detached and filled, the 16-bit gradient and the master copy's


def overflow_seconds(
    hardware: HardwareProfile, software: Software, dtype: str, parameters: float, tensors: int
) -> float:
    """Seconds over the gradients of so many parameters in `tensors` tensors, which lie in `dtype`.

    The host waits for each number that it reads, so the kernels before it and the issuing of what follows add up. Where
    no kernel takes more than a tensor, what is not waited for lasts as long as the host takes to issue it, at least;
    gradients are filled with zeros between forward and backward, whose timers wait for the device, and added to those.
    """
    check, memory = software.overflow_check, hardware.memory_seconds
    if check == "by_norm":
        return 0.0
    unscaled = 0.0 if check == "sums_read_clip_unscales" else memory("unscale", dtype, parameters)
    if check == "one_kernel":
        return unscaled
    issue = tensors * hardware.host_operation_seconds
    looked = issue * _SUM_OPERATIONS + memory("overflow_sum", dtype, parameters) + unscaled
    if check != "tensor_by_tensor":
        return looked
    loops = 2 * (memory("cast", dtype, parameters) + memory("unscale", dtype, parameters))
    late = max(0.0, issue * _LOOP_OPERATIONS - loops)
    zeros = max(issue * _ZERO_OPERATIONS, 1.5 * memory("zero", dtype, parameters))
    added = memory("accumulate", dtype, parameters) / 2  # in 16 bits
    return looked + issue * _NORM_OPERATIONS + late + zeros + added
