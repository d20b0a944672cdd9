"""Where the registry lives and how it is reached; the only file that imports MLflow, beside the model that MLflow loads.

    RAYWARD_STORE=store                        SQLite and a folder below it, without a server
    MLFLOW_TRACKING_URI=http://tracking:5000   a team's server; MLFLOW_TRACKING_USERNAME and _PASSWORD, or _TOKEN, where it asks
    MLFLOW_TRACKING_URI=postgresql+psycopg2://...   a database without a server; artifacts go to RAYWARD_STORE

A user and password within an address are moved to MLflow's variables for them, so that no run, file or message repeats them:

>>> import os
>>> os.environ |= {"MLFLOW_TRACKING_URI": "https://me:a%40b@tracking.example:5000"}
>>> tracking_uri(), os.environ["MLFLOW_TRACKING_URI"], os.environ["MLFLOW_TRACKING_PASSWORD"]
('https://tracking.example:5000', 'https://tracking.example:5000', 'a@b')
>>> for name in ("URI", "USERNAME", "PASSWORD"):
...     del os.environ[f"MLFLOW_TRACKING_{name}"]
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

from rayward import places
from rayward.config import public
from rayward.errors import RegistryError, UserError

EXPERIMENT = "rayward"
LOOK_S = (5.0, 15.0)  # seconds for a server to take a connection, and to answer
WAIT_S = 60.0  # seconds to wait for a server that went away, where nothing can go on without it


def tracking_uri() -> str:
    """Where runs and models live: MLFLOW_TRACKING_URI, or SQLite in the store.

    Raises:
        RegistryError: if the store is a URL and no MLFLOW_TRACKING_URI is given.
    """
    _move_credentials()
    if given := os.environ.get("MLFLOW_TRACKING_URI"):
        return given
    store = places.store()
    if places.is_remote(store):
        raise RegistryError(
            f"the store {store} is no place for a database of runs and models",
            "name a tracking server: export MLFLOW_TRACKING_URI=http://HOST:5000 (artifacts may still go to the store)",
        )
    return f"sqlite:///{store / 'mlflow.db'}"


def address() -> str:
    """Where runs and models live, as it may be said: without a password."""
    return public(tracking_uri())


def named() -> str:
    """The same in a sentence."""
    return f"the {'tracking server' if is_server(tracking_uri()) else 'store'} {address()}"


def is_server(uri: str) -> bool:
    """Whether this is the address of a tracking server, not of a database."""
    return uri.startswith(("http://", "https://"))


def is_there() -> bool:
    """Whether there may be anything to look at: a question must not make a SQLite file."""
    uri = tracking_uri()
    return not uri.startswith("sqlite:///") or Path(uri.removeprefix("sqlite:///")).exists()


def _move_credentials() -> None:
    """Take user and password out of the address of a server: MLflow has variables for them, and repeats addresses."""
    given = os.environ.get("MLFLOW_TRACKING_URI") or ""
    try:
        parts = urlsplit(given)
    except ValueError:
        raise RegistryError(f"MLFLOW_TRACKING_URI={public(given)} is no address", "write e.g. http://HOST:5000") from None
    if is_server(parts.geturl()) and "@" in parts.netloc:
        who, _, host = parts.netloc.rpartition("@")
        user, _, password = who.partition(":")
        moved = {"USERNAME": unquote(user), "PASSWORD": unquote(password), "URI": urlunsplit(parts._replace(netloc=host))}
        os.environ.update({f"MLFLOW_TRACKING_{name}": value for name, value in moved.items() if value})  # a user alone: as it was set


def artifacts() -> str | None:
    """Where artifacts go: below a store that is a URL, beside the SQLite file, or (None) where the tracking server says."""
    uri = tracking_uri()
    if is_server(uri) or uri.startswith("databricks"):
        return None
    store = places.store()
    if places.is_remote(store):
        return str(store / "artifacts")
    folder = Path(uri.removeprefix("sqlite:///")).absolute().parent if uri.startswith("sqlite:///") else Path(str(store))
    return (folder / "artifacts").as_uri()


def mlflow() -> Any:
    """MLflow, pointed at the store and kept from chatting and from retrying for minutes."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # stdout is the job's
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # of 7, which take minutes: what must arrive is sent again by us
    warnings.filterwarnings("ignore", module="mlflow.*")
    import mlflow

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # prints the stack of every error that it also raises
    if tracking_uri().startswith("sqlite:///"):
        Path(tracking_uri().removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    given = os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(tracking_uri())
    if given is None:  # it writes the variable itself, which would make our default look like the user's choice
        os.environ.pop("MLFLOW_TRACKING_URI", None)
    return mlflow


def client() -> Any:
    """A client of a store that answers, or RegistryError within seconds."""
    uri = tracking_uri()
    if why := unreachable():
        raise RegistryError(
            f"the tracking server {address()} does not answer: {why}",
            "start it, or check MLFLOW_TRACKING_URI; without the variable runs and models are kept in the store (RAYWARD_STORE)",
        )
    try:
        with _one_at_a_time(uri):
            made = mlflow().MlflowClient(uri)
            made.get_experiment_by_name(EXPERIMENT)
    except Exception as error:  # a database, a server, a disk: each has errors of its own
        raise explained(error) from None
    return made


def unreachable() -> str | None:
    """What keeps the tracking server from answering; None if it does, or if there is no server between us and a database."""
    import requests

    uri = tracking_uri()
    if not is_server(uri):
        return None
    try:
        answer = requests.get(f"{uri.rstrip('/')}/health", timeout=LOOK_S)
    except requests.exceptions.SSLError:
        return None  # somebody answers; MLflow knows which certificates to trust
    except requests.exceptions.Timeout:
        return "no answer in time"
    except requests.exceptions.ConnectionError as error:
        return _innermost(error)
    except requests.exceptions.RequestException as error:
        return public(str(error))
    return f"HTTP {answer.status_code} {answer.reason}" if answer.status_code in (502, 503, 504) else None


def _innermost(error: BaseException) -> str:
    """The words of the operating system within a ConnectionError of requests."""
    found = re.search(r"\[Errno [^]]*\] ([^'\")]+)", str(error))
    return found[1].strip() if found else "no connection"


def explained(error: Exception) -> RegistryError:
    """What MLflow or a database raised, in one line and with the way out."""
    if isinstance(error, RegistryError):
        return error
    first = public((str(error) or type(error).__name__).splitlines()[0])
    status = refusal(error)
    if status in (401, 403):
        return RegistryError(
            f"the tracking server {address()} refuses this user (HTTP {status})",
            "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (or MLFLOW_TRACKING_TOKEN) to those of a user who may write there",
        )
    if isinstance(error, ModuleNotFoundError) and error.name in ("psycopg", "psycopg2"):
        way_out = "pip install 'rayward[server]', and write postgresql+psycopg2://USER:PASSWORD@HOST/DATABASE"
        return RegistryError(f"{address()} needs the driver {error.name}, which is not installed", way_out)
    return RegistryError(f"the store {address()} cannot be used: {first}", "check RAYWARD_STORE and MLFLOW_TRACKING_URI")


@contextmanager
def explaining() -> Iterator[None]:
    """Errors of MLflow, a network or a database in our words: for calls that follow the first one."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # each of them has errors of its own
        raise explained(error) from None


def refusal(error: Exception) -> int | None:
    """The HTTP status of an answer that would be the same next time (4xx), or None: it is worth trying again."""
    answer = getattr(error, "response", None)
    if answer is not None:
        status = int(answer.status_code)
    elif found := re.search(r"failed with error code (\d{3})", str(error)):
        status = int(found[1])
        if status == 404:  # no words of MLflow's: a gateway whose server is away
            return None
    elif isinstance(error, mlflow().MlflowException):
        status = int(error.get_http_status_code())
    else:
        return None
    return status if 400 <= status < 500 and status not in (408, 429) else None


@contextmanager
def _one_at_a_time(uri: str) -> Iterator[None]:
    """Two processes must not make the tables of one new SQLite file at once: the folder is locked meanwhile."""
    if not uri.startswith("sqlite:///"):
        yield
        return
    folder = Path(uri.removeprefix("sqlite:///")).parent
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def experiment(client: Any) -> str:
    """The id of our experiment, made where it is missing."""
    found = client.get_experiment_by_name(EXPERIMENT)
    if found is None:
        try:
            return str(client.create_experiment(EXPERIMENT, artifact_location=artifacts()))
        except mlflow().MlflowException:  # another job may have been quicker
            found = client.get_experiment_by_name(EXPERIMENT)
            if found is None:
                raise
    return str(found.experiment_id)


def wait_s() -> float:
    """Seconds to wait for a server that went away: RAYWARD_TRACKING_WAIT_S, or a minute."""
    try:
        return float(os.environ.get("RAYWARD_TRACKING_WAIT_S") or WAIT_S)
    except ValueError:
        raise RegistryError(
            f"RAYWARD_TRACKING_WAIT_S={os.environ['RAYWARD_TRACKING_WAIT_S']} is not a number of seconds", "write e.g. 60"
        ) from None


@contextmanager
def no_chatter() -> Iterator[None]:
    """MLflow prints progress bars and advice around a registration; what matters is said by us."""
    with (
        open(os.devnull, "w", encoding="utf-8") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield
