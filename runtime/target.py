"""Which plans this runtime carries out: those that were made for it."""

from __future__ import annotations

from planner.plan import Plan
from profiles.input_error import InputError

TARGET = "meshwright"


def check_target(plan: Plan) -> None:
    """Raise InputError for a plan that another trainer is to carry out."""
    if plan.job.target != TARGET:
        raise InputError(
            f"the plan is for {plan.job.target}, and this is another trainer",
            where="plan: job.target",
            expected=TARGET,
            got=plan.job.target,
            hint=f"plan again with --target {TARGET}",
        )
