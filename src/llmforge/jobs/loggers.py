"""Sends metrics to the tracking service that the config names: wandb, mlflow, tensorboard or trackio.

Each is reached through its own package, which is imported only when asked for. What can be wrong with a logger
(package, key, option, server) is found when it is made, before anything expensive.
"""

import contextlib
import importlib.util
import netrc
import os
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from llmforge.errors import ConfigError
from llmforge.jobs.events import as_json, redact

Provider = Literal["wandb", "mlflow", "tensorboard", "trackio"]

_TEXT, _FLAG, _TEXTS = "text", "true or false", "a list"
_TYPES: Mapping[str, type] = {_TEXT: str, _FLAG: bool, _TEXTS: list}
OPTIONS: Mapping[str, Mapping[str, str]] = {
    "wandb": {
        "project": _TEXT,
        "group": _TEXT,
        "name": _TEXT,
        "tags": _TEXTS,
        "entity": _TEXT,
        "mode": _TEXT,
        "dir": _TEXT,
    },
    "mlflow": {
        "tracking_uri": _TEXT,
        "experiment_name": _TEXT,
        "create_experiment_if_not_exists": _FLAG,
        "run_name": _TEXT,
    },
    "tensorboard": {"log_dir": _TEXT},
    "trackio": {"project": _TEXT, "space_id": _TEXT, "name": _TEXT},
}
_PROJECT = "llmforge"
_WANDB_MODES = ("online", "offline", "disabled", "shared")
_SECONDS_BETWEEN_MLFLOW_REQUESTS = 5.0
_MLFLOW_LONGEST_PARAMETER = 500  # characters; older servers refuse more
_MLFLOW_PARAMETERS_PER_REQUEST = 100
_MLFLOW_METRICS_PER_REQUEST = 1000


class MetricLogger(ABC):
    """A Reporter that sends numbers to a service and closes its run when the training ends.

    `place` says where a person finds them.
    """

    place: str

    def event(self, event: str, **fields: Any) -> None:
        """Send the numbers of a `step` or an `evaluation`; end the service's run at `finished` or `failed`."""
        match event:
            case "step" | "evaluation":
                self.log(metrics_of(event, fields), fields["step"])
            case "finished" | "failed":
                self.finish(failed=event == "failed")

    def note(self, text: str) -> None:
        """Ignore it: notes are for the person at the terminal."""
        return

    @abstractmethod
    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Send named numbers that belong to an optimizer step."""

    @abstractmethod
    def finish(self, *, failed: bool) -> None:
        """Send what is left and end the run."""


def make_logger(
    provider: Provider,
    provider_config: Mapping[str, Any],
    *,
    tag: str,
    model_id: str,
    resolved: Mapping[str, Any],
    run_dir: Path,
) -> MetricLogger:
    """Open a run at the tracking service, with the resolved config as its parameters.

    Raises ConfigError for a missing package or key, an unknown option, or a service that refuses.
    """
    check_logger(provider, provider_config)
    parameters = as_json(resolved)
    try:
        match provider:
            case "wandb":
                return WandbLogger(provider_config, tag, model_id, parameters, run_dir)
            case "mlflow":
                return MlflowLogger(provider_config, tag, model_id, parameters)
            case "tensorboard":
                return TensorBoardLogger(provider_config, run_dir)
            case "trackio":
                return TrackioLogger(provider_config, tag, model_id, parameters)
    except ConfigError:
        raise
    except Exception as error:  # each package has its own exception tree, and none may be imported here
        raise ConfigError(
            f"logger: {provider} could not start a run: {redact(str(error))}; check logger.provider_config and the "
            "network, or remove `logger` to train without it"
        ) from error


def check_logger(provider: str, provider_config: Mapping[str, Any]) -> None:
    """Find what is wrong with a logger without contacting anything.

    Raises ConfigError for an unknown provider or option, a missing package, or a missing key.
    """
    if provider not in OPTIONS:
        raise ConfigError(f"logger.provider is {provider!r}; allowed are {', '.join(OPTIONS)}")
    allowed = OPTIONS[provider]
    for key, value in provider_config.items():
        if key not in allowed:
            raise ConfigError(
                f"logger.provider_config.{key} is not an option of {provider}; allowed are {', '.join(allowed)}"
            )
        if value is not None and not isinstance(value, _TYPES[allowed[key]]):
            raise ConfigError(f"logger.provider_config.{key} is {value!r}; it must be {allowed[key]}")
    if importlib.util.find_spec(provider) is None:
        raise ConfigError(
            f"logger.provider is {provider}, whose package is not installed; "
            f"install it with `pip install 'llmforge[{provider}]'`"
        )
    if provider == "wandb":
        _check_wandb(provider_config)
    if provider == "mlflow":
        _check_mlflow(provider_config)


def metrics_of(event: str, fields: Mapping[str, Any]) -> dict[str, float]:
    """Name the numbers of a `step` (`train/loss`, …) or an `evaluation` (`eval/loss`, …) as a service shows them."""
    prefix = {"step": "train", "evaluation": "eval"}[event]
    return {
        f"{prefix}/{name.removeprefix(f'{prefix}_')}": float(value)
        for name, value in fields.items()
        if name != "step" and isinstance(value, int | float)
    }


class WandbLogger(MetricLogger):
    """Weights & Biases."""

    def __init__(
        self, options: Mapping[str, Any], tag: str, model_id: str, parameters: dict[str, Any], run_dir: Path
    ) -> None:
        import wandb

        self._run = wandb.init(
            project=options.get("project") or os.environ.get("WANDB_PROJECT") or _PROJECT,
            group=options.get("group") or model_id,
            name=options.get("name") or tag,
            tags=options.get("tags"),
            entity=options.get("entity"),
            mode=options.get("mode"),
            dir=options.get("dir") or str(run_dir),
            config=parameters,
            reinit="create_new",
            # The display owns the terminal: wandb neither captures it nor writes to it.
            settings=wandb.Settings(console="off", silent=True),
        )
        self._run.define_metric("*", step_metric="step")  # evaluations share a step with training
        self.place = str(self._run.dir) if self._run.offline else str(self._run.url)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Send named numbers that belong to an optimizer step."""
        self._run.log({**metrics, "step": step})

    def finish(self, *, failed: bool) -> None:
        """Send what is left and end the run."""
        self._run.finish(exit_code=int(failed))


class MlflowLogger(MetricLogger):
    """MLflow, through a client of its own: the process's active run and tracking address stay as they are."""

    def __init__(self, options: Mapping[str, Any], tag: str, model_id: str, parameters: dict[str, Any]) -> None:
        # One unanswered request must not hold the training for MLflow's default of several minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        address = _mlflow_address(options)
        if _is_folder(address):
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # naming a folder is asking for the file store
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._metric = Metric
        self._client = MlflowClient(tracking_uri=address)
        name = options.get("experiment_name") or os.environ.get("MLFLOW_EXPERIMENT_NAME") or _PROJECT
        experiment = self._client.get_experiment_by_name(name)
        if experiment is not None:
            experiment_id = experiment.experiment_id
        elif options.get("create_experiment_if_not_exists", True):
            experiment_id = self._client.create_experiment(name)
        else:
            raise ConfigError(
                f"logger.provider_config.experiment_name: {name!r} does not exist at {redact(address)}; create it, or "
                "set create_experiment_if_not_exists: true"
            )
        run = self._client.create_run(
            experiment_id, run_name=options.get("run_name") or tag, tags={"model_id": model_id, "tag": tag}
        )
        self._run_id = run.info.run_id
        self.place = f"{redact(address)}, experiment {name}, run {run.info.run_name}"
        params = [Param(key, value[:_MLFLOW_LONGEST_PARAMETER]) for key, value in _flatten(parameters).items()]
        for start in range(0, len(params), _MLFLOW_PARAMETERS_PER_REQUEST):
            self._client.log_batch(self._run_id, params=params[start : start + _MLFLOW_PARAMETERS_PER_REQUEST])
        self._waiting: list[Any] = []
        self._sent_at = time.monotonic()

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Keep the numbers for the next request; there is one every few seconds."""
        now = int(time.time() * 1000)
        self._waiting += [self._metric(name, value, now, step) for name, value in metrics.items()]
        if time.monotonic() - self._sent_at >= _SECONDS_BETWEEN_MLFLOW_REQUESTS:
            self._send()

    def finish(self, *, failed: bool) -> None:
        """Send what is left and end the run."""
        self._send()
        self._client.set_terminated(self._run_id, "FAILED" if failed else "FINISHED")

    def _send(self) -> None:
        for start in range(0, len(self._waiting), _MLFLOW_METRICS_PER_REQUEST):
            self._client.log_batch(self._run_id, metrics=self._waiting[start : start + _MLFLOW_METRICS_PER_REQUEST])
        self._waiting = []
        self._sent_at = time.monotonic()


class TensorBoardLogger(MetricLogger):
    """Event files for TensorBoard, written without torch or TensorFlow."""

    def __init__(self, options: Mapping[str, Any], run_dir: Path) -> None:
        from tensorboard.summary import Writer

        directory = options.get("log_dir") or str(run_dir / "tensorboard")
        self._writer = Writer(directory)
        self.place = directory

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Write named numbers that belong to an optimizer step."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()  # someone is watching; by itself it would wait two minutes

    def finish(self, *, failed: bool) -> None:
        """Write what is left and close the file."""
        self._writer.close()


class TrackioLogger(MetricLogger):
    """Trackio: a local dashboard, or a Hugging Face Space."""

    def __init__(self, options: Mapping[str, Any], tag: str, model_id: str, parameters: dict[str, Any]) -> None:
        import trackio

        project = options.get("project") or _PROJECT
        space_id = options.get("space_id")
        with contextlib.redirect_stdout(sys.stderr):  # it greets on stdout, which belongs to `--json`
            self._run = trackio.init(
                project=project,
                name=options.get("name") or tag,
                group=model_id,
                space_id=space_id,
                config=parameters,
                embed=False,
            )
        self.place = f"https://huggingface.co/spaces/{space_id}" if space_id else f"trackio show --project {project}"

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Send named numbers that belong to an optimizer step."""
        self._run.log(dict(metrics), step=step)

    def finish(self, *, failed: bool) -> None:
        """Send what is left and end the run."""
        with contextlib.redirect_stdout(sys.stderr):
            self._run.finish()


def _check_wandb(options: Mapping[str, Any]) -> None:
    mode = options.get("mode") or os.environ.get("WANDB_MODE") or "online"
    if mode not in _WANDB_MODES:
        raise ConfigError(f"logger: the wandb mode is {mode!r}; allowed are {', '.join(_WANDB_MODES)}")
    if mode in ("offline", "disabled") or os.environ.get("WANDB_API_KEY") or _has_wandb_login():
        return
    raise ConfigError(
        "logger.provider is wandb, but there is no key: set WANDB_API_KEY, or run `wandb login`, or set "
        "logger.provider_config.mode: offline to record without a server"
    )


def _has_wandb_login() -> bool:
    """Look for what `wandb login` leaves behind."""
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    places = [os.environ.get("NETRC", ""), os.path.expanduser("~/.netrc"), os.path.expanduser("~/_netrc")]
    for place in places:
        try:
            if place and netrc.netrc(place).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


def _check_mlflow(options: Mapping[str, Any]) -> None:
    address = _mlflow_address(options)
    database = urlsplit(address).scheme.partition("+")[0]
    if database in ("sqlite", "postgresql", "mysql", "mssql") and importlib.util.find_spec("sqlalchemy") is None:
        raise ConfigError(
            f"logger.provider_config.tracking_uri is {redact(address)}, a database, which needs the full package: "
            "`pip install mlflow`; servers (http, https, databricks) and folders need nothing more"
        )


def _mlflow_address(options: Mapping[str, Any]) -> str:
    address = options.get("tracking_uri") or os.environ.get("MLFLOW_TRACKING_URI")
    if not address:
        raise ConfigError(
            "logger.provider is mlflow, but there is no server: set logger.provider_config.tracking_uri (or "
            "MLFLOW_TRACKING_URI) to http(s)://…, databricks, or a folder"
        )
    return address


def _is_folder(address: str) -> bool:
    return address != "databricks" and urlsplit(address).scheme in ("", "file")


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Turn nested sections into dotted names, which is all that MLflow's parameters can hold."""
    flat: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = str(value)
    return flat
