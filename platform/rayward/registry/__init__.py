"""The registry: MLflow keeps the runs, and the models that passed with what they came from. The only place that knows MLflow.

Runs and models live in MLFLOW_TRACKING_URI, or in SQLite and a folder under the store (RAYWARD_STORE, `store/` by default):

    store/mlflow.db     runs, metrics, versions, aliases, tags
    store/artifacts/    reports and models

A version leads back: its tags name the data digest, the label settings and the code; its run holds settings, metrics over time, the
data sets and the report. A model is a pyfunc whose code is a file of this package and whose weights are safetensors: no pickle.

    backend.py    where it lives, and how it is reached
    runs.py       runs: metrics, params, tags, files
    buffer.py     what is on its way to a server that may be away
    versions.py   models: register, find, promote, roll back
    comparing.py  versions side by side
    page.py       the MLflow UI
    pyfunc.py     the model that MLflow loads
"""

from rayward.registry.backend import address, is_server, tracking_uri, unreachable
from rayward.registry.backend import client as _client
from rayward.registry.comparing import compare
from rayward.registry.page import ui
from rayward.registry.runs import Ran, RunLog, run, run_of_submission
from rayward.registry.versions import (
    CHAMPION,
    check_name,
    find,
    identity,
    model_address,
    model_folder,
    models,
    pinned,
    promote,
    register,
    rollback,
    tag,
)

__all__ = [
    "CHAMPION",
    "Ran",
    "RunLog",
    "_client",
    "address",
    "check_name",
    "compare",
    "find",
    "identity",
    "is_server",
    "model_address",
    "model_folder",
    "models",
    "pinned",
    "promote",
    "register",
    "rollback",
    "run",
    "run_of_submission",
    "tag",
    "tracking_uri",
    "ui",
    "unreachable",
]
