"""Weights & Biases and MLflow: the figures of each step sent there too, by rank 0, where a person asks for it."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from profiles.input_error import InputError
from profiles.store import write_atomically

IDS_FILE = "trackers.json"  # the run's name at each tracker, by which a resumed run goes on there
EXPERIMENT = "meshwright"  # of MLflow
# An unreachable MLflow server is told within seconds and not after MLflow's default of minutes, in which the other
# ranks would give up waiting for this one.
_MLFLOW_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}
_WANDB_PATIENCE_SECONDS = 60.0
_LOOK_SECONDS = 10  # for W&B to answer before any rank starts


class Tracker(Protocol):
    """Takes numbers of a step, and in the end whether the run failed."""

    def log(self, figures: dict[str, float], step: int) -> None: ...

    def end(self, *, failed: bool) -> None: ...


def check_installed(wandb: str | None, mlflow: str | None) -> None:
    """Raise InputError where a tracker is asked for whose package is missing."""
    for name, wanted in (("wandb", wandb), ("mlflow", mlflow)):
        if wanted is not None and importlib.util.find_spec(name) is None:
            raise InputError(
                f"--{name} needs a package that is not installed",
                where=f"--{name}",
                expected=f"the extra {name}",
                got=f"no module named {name}",
                hint=f"pip install 'meshwright[{name}]'",
            )


def check_reachable(wandb: str | None, mlflow: str | None) -> None:
    """Raise InputError where a tracker that is asked for does not answer, or does not know who asks.

    Nothing is made there. W&B is not asked where WANDB_MODE keeps it from its server.
    """
    check_installed(wandb, mlflow)
    if wandb is not None and os.environ.get("WANDB_MODE", "online") in ("online", "run"):
        with _unreachable_is_input_error("wandb", wandb):
            from wandb import Api

            _ = Api(timeout=_LOOK_SECONDS).viewer
    if mlflow is not None:
        with _unreachable_is_input_error("mlflow", mlflow):
            _mlflow_client(mlflow).get_experiment_by_name(EXPERIMENT)


@contextmanager
def _unreachable_is_input_error(name: str, wanted: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # theirs are of many kinds
        raise InputError(
            f"{name} cannot be reached",
            where=f"--{name} {wanted}",
            expected="a tracker that takes this run",
            got=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
            hint="WANDB_MODE=offline keeps the run in its folder, for `wandb sync`" if name == "wandb" else "",
        ) from None


class Trackers:
    """Those that are asked for: a W&B project, and the URI of an MLflow server.

    Raises InputError where one cannot be reached at the start. One that fails later is left, with a line on standard
    error, and training goes on.
    """

    def __init__(
        self, run_dir: Path, settings: dict[str, Any], *, wandb: str | None, mlflow: str | None, resume: bool
    ) -> None:
        check_installed(wandb, mlflow)
        path = run_dir / IDS_FILE
        ids: dict[str, str] = json.loads(path.read_text()) if resume and path.exists() else {}
        self._trackers: dict[str, Tracker] = {}
        if wandb is not None:
            ids.setdefault("wandb", uuid.uuid4().hex[:12])
            self._open("wandb", wandb, lambda: _Wandb(wandb, run_dir, settings, ids["wandb"]))
        if mlflow is not None:
            opened = self._open("mlflow", mlflow, lambda: _Mlflow(mlflow, run_dir, settings, ids.get("mlflow")))
            ids["mlflow"] = opened.run_id
        if ids:
            write_atomically(path, json.dumps(ids) + "\n")

    def _open(self, name: str, wanted: str, make: Callable[[], Any]) -> Any:
        with _unreachable_is_input_error(name, wanted):
            self._trackers[name] = made = make()
        return made

    def write(self, record: dict[str, Any]) -> None:
        """One step's record; what is no number is left out."""
        figures = {name: float(value) for name, value in record.items() if name != "step" and value is not None}
        for name in list(self._trackers):
            self._attempt(name, lambda tracker: tracker.log(figures, record["step"]))

    def end(self, *, failed: bool) -> None:
        for name in list(self._trackers):
            self._attempt(name, lambda tracker: tracker.end(failed=failed))

    def _attempt(self, name: str, act: Callable[[Tracker], None]) -> None:
        try:
            act(self._trackers[name])
        except Exception as error:  # whatever it is, it must not end the training
            del self._trackers[name]
            sys.stderr.write(f"{name} failed, and is left: {type(error).__name__}: {error}\n")


class _Wandb:
    def __init__(self, project: str, run_dir: Path, settings: dict[str, Any], run_id: str) -> None:
        import wandb

        quiet = wandb.Settings(console="off", silent=True, init_timeout=_WANDB_PATIENCE_SECONDS)
        self._run = wandb.init(
            project=project,
            dir=str(run_dir),
            name=run_dir.name,
            id=run_id,
            resume="allow",
            config=settings,
            settings=quiet,
        )

    def log(self, figures: dict[str, float], step: int) -> None:
        self._run.log(figures, step=step)

    def end(self, *, failed: bool) -> None:
        self._run.finish(exit_code=1 if failed else 0)


def _mlflow_client(uri: str) -> Any:
    for name, value in _MLFLOW_PATIENCE.items():
        os.environ.setdefault(name, value)
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=uri)


class _Mlflow:
    def __init__(self, uri: str, run_dir: Path, settings: dict[str, Any], run_id: str | None) -> None:
        from mlflow.entities import Param, RunStatus

        self._client = _mlflow_client(uri)
        if run_id is None:
            known = self._client.get_experiment_by_name(EXPERIMENT)
            experiment = known.experiment_id if known is not None else self._client.create_experiment(EXPERIMENT)
            run_id = self._client.create_run(experiment, run_name=run_dir.name).info.run_id
            texts = [Param(name, str(value)[:500]) for name, value in settings.items()]
            self._client.log_batch(run_id, params=texts)
        else:
            self._client.update_run(run_id, status=RunStatus.to_string(RunStatus.RUNNING))
        self.run_id = run_id

    def log(self, figures: dict[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1e3)
        metrics = [Metric(name, value, now, step) for name, value in figures.items()]
        self._client.log_batch(self.run_id, metrics=metrics, synchronous=False)

    def end(self, *, failed: bool) -> None:
        self._client.set_terminated(self.run_id, "FAILED" if failed else "FINISHED")
