"""The MLflow UI: of the team's server where there is one, else a server of our own over the store.

rayward ui
MLFLOW_TRACKING_URI=http://tracking:5000 rayward ui
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import webbrowser

from rayward.errors import RegistryError
from rayward.registry import backend


def ui(host: str, port: int, browse: bool) -> None:
    """Open the UI of the tracking server in a browser; without one, serve the UI over the store until it is stopped."""
    if backend.is_server(backend.tracking_uri()):
        _at_the_server(browse)
        return
    backend.client()  # makes a new store, or says why it cannot be used
    page = f"http://{host}:{port}/#/models"
    arguments = ["-m", "mlflow", "ui", "--host", host, "--port", str(port)]
    if (artifacts := backend.artifacts()) is not None:
        arguments += ["--default-artifact-root", artifacts]
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, UnicodeError) as error:
            why = getattr(error, "strerror", None) or error
            raise RegistryError(f"cannot listen on {host}:{port}: {why}", "choose another: rayward ui --port 5001, or --host") from None
    print(f"models: {page}    runs: http://{host}:{port}/#/experiments    (Ctrl-C ends it)", flush=True)
    held = {"MLFLOW_BACKEND_STORE_URI": backend.tracking_uri()}  # not among the words, where `ps` shows a password to everybody
    server = subprocess.Popen([sys.executable, *arguments], env={**os.environ, **held})
    try:
        if browse:
            while server.poll() is None and not _answers(host, port):
                time.sleep(0.3)
            webbrowser.open(page)
        server.wait()
    except KeyboardInterrupt:
        print("stopped", flush=True)
    finally:
        server.terminate()
        server.wait()


def _at_the_server(browse: bool) -> None:
    address = backend.address().rstrip("/")
    if why := backend.unreachable():
        raise RegistryError(f"the tracking server {address} does not answer: {why}", "start it, or check MLFLOW_TRACKING_URI")
    print(f"models: {address}/#/models    runs: {address}/#/experiments    (the team's server, from MLFLOW_TRACKING_URI)", flush=True)
    if browse:
        webbrowser.open(f"{address}/#/models")


def _answers(host: str, port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((host, port)) == 0
