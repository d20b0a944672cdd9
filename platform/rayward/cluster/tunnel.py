"""The head's dashboard, through ssh: where a file of Ray's cluster launcher says which machine it is and who may log in.

    rayward jobs list --cluster cluster.yaml      # opens the tunnel, asks, and closes it

A dashboard listens on the loopback of its own machine, and Ray's HTTP is not encrypted, so a token never travels to the head by itself.
Machines of one's own are reached with the `auth` of the file; in a cloud `ray dashboard` knows the address and the key. The tunnel ends
with the process that opened it.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rayward.errors import SettingsError

DASHBOARD_PORT = 8265
OPEN_S = 60.0  # how long the way through ssh may take to open: a cloud is asked for the head's address first
LOOK_S = 0.1  # between two looks
_open: dict[str, str] = {}  # file -> URL


def dashboard_through_ssh(file: str) -> str:
    """The URL on this machine behind which the dashboard of a launcher's file answers, until this process ends.

    Raises:
        SettingsError: with the command to run by hand, if the file is none of the launcher's or ssh does not get there.
    """
    if file not in _open:
        config = read_launcher_file(file)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        _start(file, ssh_command(config, file, port), ssh_command(config, file, DASHBOARD_PORT), port)
        _open[file] = f"http://127.0.0.1:{port}"
    return _open[file]


def read_launcher_file(file: str) -> dict[str, Any]:
    """What a file of Ray's cluster launcher says, or SettingsError if it is none."""
    import yaml

    try:
        with open(file, encoding="utf-8") as opened:
            config = yaml.safe_load(opened)
        _ = config["provider"]["type"], dict(config.get("auth") or {}), list(config.get("head_start_ray_commands") or [])
    except OSError as error:
        raise SettingsError(f"--cluster {file} cannot be read: {error.strerror}", "give the file that `ray up` took") from None
    except (yaml.YAMLError, ValueError, KeyError, TypeError):
        raise SettingsError(
            f"{file} is not a file of Ray's cluster launcher: provider.type is missing, or auth is no table", "see cluster.yaml"
        ) from None
    return dict(config)


def ssh_command(config: dict[str, Any], file: str, port: int) -> list[str]:
    """What opens the tunnel to a cluster's dashboard at a port of this machine.

    >>> ours = {"provider": {"type": "local", "head_ip": "10.0.0.4"}, "auth": {"ssh_user": "me", "ssh_private_key": "/k"}}
    >>> " ".join(ssh_command(ours, "ours.yaml", 8265))
    'ssh -N -o ExitOnForwardFailure=yes -L 8265:127.0.0.1:8265 -i /k me@10.0.0.4'
    >>> ssh_command({"provider": {"type": "aws"}}, "cluster.yaml", 9000)[1:]
    ['dashboard', 'cluster.yaml', '--port', '9000', '--remote-port', '8265']
    """
    provider, auth = config["provider"], config.get("auth") or {}
    started = " ".join(map(str, config.get("head_start_ray_commands") or []))
    said = re.search(r"--dashboard-port[= ](\d+)", started)
    remote = int(said[1]) if said else DASHBOARD_PORT
    if provider["type"] != "local" or not provider.get("head_ip"):
        return [str(Path(sys.executable).with_name("ray")), "dashboard", file, "--port", str(port), "--remote-port", str(remote)]
    key = ["-i", os.path.expanduser(str(auth["ssh_private_key"]))] if auth.get("ssh_private_key") else []
    who = f"{auth['ssh_user']}@{provider['head_ip']}" if auth.get("ssh_user") else str(provider["head_ip"])
    return ["ssh", "-N", "-o", "ExitOnForwardFailure=yes", "-L", f"{port}:127.0.0.1:{remote}", *key, who]


def _start(file: str, command: list[str], by_hand: list[str], port: int) -> None:
    """Run the command, wait until something listens at the port, and see to it that it ends with this process."""
    command = [*command[:1], "-o", "BatchMode=yes", *command[1:]] if command[0] == "ssh" else command  # nobody is asked for a password
    by_hand = [Path(by_hand[0]).name, *by_hand[1:]]
    way_out = f"by hand, in another terminal: {shlex.join(by_hand)}  and then --address http://127.0.0.1:{DASHBOARD_PORT}"
    with tempfile.TemporaryFile() as said:
        try:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True)
        except OSError as error:
            raise SettingsError(f"no tunnel to the head of {file}: {command[0]}: {error.strerror}", way_out) from None
        atexit.register(_end, process)
        until = time.monotonic() + OPEN_S
        while process.poll() is None and time.monotonic() < until:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return
            time.sleep(LOOK_S)
        ended = process.poll() is not None
        _end(process)
        said.seek(0)
        lines = [line.strip() for line in said.read().decode(errors="replace").splitlines() if line.strip()]
    why = (lines[-1] if lines else f"{command[0]} ended with exit code {process.returncode}") if ended else f"not open after {OPEN_S:g} s"
    raise SettingsError(f"no tunnel to the head of {file}: {why}", way_out)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the tunnel with all its processes."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(5.0)
