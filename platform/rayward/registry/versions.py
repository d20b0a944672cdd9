"""Models and their versions: register one with what it came from, find it by name and alias, promote it, roll back.

A version leads back: its tags name the data digest, the label settings and the code; its run holds settings, metrics over time, the
data sets and the report. An alias (`champion`) is what others load, models:/NAME@champion; which versions had it before is kept in a
tag of the model, so that `rollback` can give it back.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from rayward import places
from rayward.config import public, suggest
from rayward.errors import RegistryError
from rayward.registry import backend
from rayward.registry.runs import RunLog
from rayward.storage import code_version

CHAMPION = "champion"
INSIDE = "artifacts/model"  # where the folder of a model lies within what MLflow keeps
BEFORE = "rayward.before."  # tag of a model: the versions that had an alias before, oldest first


def check_name(name: str) -> None:
    """A name a model can be registered under, or RegistryError: said before the training, not after it."""
    if name and (not re.fullmatch(r"[\w.-]+( [\w.-]+)*", name) or set(name) == {"."}):
        raise RegistryError(f"--register {name!r} is no name for a model", "use letters, digits, . - and _")


def register(log: RunLog, folder: Path, name: str, tags: Mapping[str, Any]) -> str:
    """Put the model of a run into the registry under `name`; returns its version. Registering the same run twice gives one version.

    A server that is away is waited for (RAYWARD_TRACKING_WAIT_S, a minute).

    Raises:
        RegistryError: if it does not come back; the model stays in `folder`, and the same command registers it.
    """

    def once() -> str:
        before = [str(v.version) for v in _versions(log.client, name) if v.run_id == log.id]
        version = before[0] if before else _log_model(log, folder, name)
        _tag(log.client, name, version, {**tags, "code_version": code_version()})  # also where a run was killed between the two
        log.client.update_model_version(name, version, description=_card(name, version, tags))
        return version

    return _patiently(once, f"registering {name}", f"the model is in {folder}; run the same command again: it registers without training")


def _patiently(act: Callable[[], str], what: str, way_out: str) -> str:
    """Act, and try again for a while where the server is away."""
    patience, began, pause = backend.wait_s(), time.monotonic(), 1.0
    while True:
        why = backend.unreachable()
        if why is None:
            try:
                return act()
            except (OSError, backend.mlflow().MlflowException) as error:  # of a network, a database, an artifact store
                found, status = backend.explained(error), backend.refusal(error)
                if status in (401, 403):
                    raise RegistryError(f"{what}: {found.what}", f"{found.way_out}; {way_out}") from None
                if status is not None or isinstance(error, FileNotFoundError):
                    raise RegistryError(f"{what}: {public(str(error)).splitlines()[0]}", way_out) from None
                why = found.what
        waited = time.monotonic() - began
        if waited + pause > patience:
            raise RegistryError(f"{what}: {backend.named()} did not come back within {patience:.0f} s: {why}", way_out)
        print(f"{what}: {backend.named()} is away ({why}); {waited:.0f} of {patience:.0f} s", file=sys.stderr, flush=True)
        time.sleep(pause)
        pause = min(2 * pause, 10.0)


def _log_model(log: RunLog, folder: Path, name: str) -> str:
    """Log the model under its run, and register it; returns the version."""
    mlflow = backend.mlflow()
    column, array, kinds = mlflow.types.ColSpec, mlflow.types.schema.Array, mlflow.types.DataType
    text, number = kinds.string, kinds.double
    inputs = [column(text, "prompt"), column(text, "answer", required=False), column(array(text), "steps", required=False)]
    lists = [column(array(number), name) for name in ("step_scores", "member_scores")]
    outputs = [column(number, "score"), column(number, "probability"), *lists]
    signature = mlflow.models.ModelSignature(inputs=mlflow.types.Schema(inputs), outputs=mlflow.types.Schema(outputs))
    package = Path(__file__).parent.parent
    with backend.no_chatter(), mlflow.start_run(run_id=log.id):  # it has a word at the end, too
        info = mlflow.pyfunc.log_model(
            name="model",
            python_model=str(Path(__file__).parent / "pyfunc.py"),
            artifacts={"model": str(folder)},
            code_paths=[str(package)],
            signature=signature,
            pip_requirements=_requirements(),
            registered_model_name=name,
        )
    return str(info.registered_model_version)


def _card(name: str, version: str, tags: Mapping[str, Any]) -> str:
    """A few lines of Markdown for who browses the registry."""
    said = {key: value for key, value in tags.items() if key.startswith("best_") and isinstance(value, float)}
    scores = ", ".join(f"{key.removeprefix('best_')} {value:.3f}" for key, value in sorted(said.items()))
    counts = f"{tags.get('examples.train')} examples" if tags.get("examples.train") else "examples"
    return (
        f"A reward model trained on {counts} of **{tags.get('labeler') or 'judgements'}** with `{tags.get('objective')}`"
        f" from `{tags.get('base_model')}`" + (f"; on validation: {scores}" if scores else "") + ".\n\n"
        f"Data digest `{tags.get('data_digest')}`. Temperature `{tags.get('temperature')}`.\n\n"
        f'```python\nmlflow.pyfunc.load_model("models:/{name}/{version}").predict(rows)  # prompt, answer -> score\n```'
    )


def _requirements() -> list[str]:
    from importlib.metadata import version

    names = ("torch", "transformers", "safetensors", "tokenizers", "pyarrow", "numpy", "jinja2", "mlflow")
    return [f"{n}=={version(n).partition('+')[0]}" for n in names]


def _versions(client: Any, name: str) -> list[Any]:
    quote = '"' if "'" in name else "'"
    found = client.search_model_versions(f"name = {quote}{name}{quote}")
    return sorted(found, key=lambda v: int(v.version), reverse=True)


@backend.explaining()
def models() -> list[dict[str, Any]]:
    """Every version of every model, newest first: name, version, aliases, tags, run, when."""
    client = backend.client()
    return [row for name in _names(client) for row in _rows(client, name)]


def _names(client: Any) -> list[str]:
    found = client.search_registered_models()
    every = list(found)
    while found.token:  # MLflow gives a hundred at a time
        found = client.search_registered_models(page_token=found.token)
        every += found
    return sorted(m.name for m in every)


def _rows(client: Any, name: str) -> list[dict[str, Any]]:
    """Every version of a model, newest first; none if there is no such model."""
    versions = _versions(client, name)
    aliases: dict[str, list[str]] = {}
    if versions:
        for alias, number in client.get_registered_model(name).aliases.items():
            aliases.setdefault(str(number), []).append(alias)
    return [
        {
            "name": v.name,
            "version": str(v.version),
            "aliases": sorted(aliases.get(str(v.version)) or []),
            "created": time.strftime("%Y-%m-%d %H:%M", time.localtime(v.creation_timestamp / 1000)),
            "run_id": v.run_id,
            "tags": dict(v.tags),
        }
        for v in versions
    ]


@backend.explaining()
def find(reference: str) -> dict[str, Any]:
    """One version by `NAME`, `NAME@ALIAS` or `NAME/VERSION`, with or without `models:/`; a bare name is its champion, or its newest."""
    reference = reference.removeprefix("models:/")
    name, at, alias = reference.partition("@")
    name, slash, number = name.partition("/")
    client = backend.client()
    mine = _rows(client, name)
    if not mine:
        known = _names(client)
        raise RegistryError(
            f"no model {name} in {backend.address()}",
            suggest(name, known) if known else "register one: train_reward_model --register NAME",
        )
    if at:
        found = [row for row in mine if alias in row["aliases"]]
        way_out = f"rayward models promote {name} {mine[0]['version']} --alias {alias}"
    elif slash:
        found = [row for row in mine if row["version"] == number]
        way_out = f"it has {', '.join(row['version'] for row in mine)}"
    else:
        found = [row for row in mine if CHAMPION in row["aliases"]] or mine
        way_out = ""
    if not found:
        raise RegistryError(f"{name} has no {'alias ' + alias if at else 'version ' + number}", way_out)
    run_ = client.get_run(found[0]["run_id"])
    return {**found[0], "params": dict(run_.data.params), "metrics": dict(run_.data.metrics)}


@backend.explaining()
def promote(name: str, version: str, alias: str = CHAMPION) -> dict[str, str | None]:
    """Give a version an alias; returns which version had it before."""
    _check_bare(name, "promote NAME VERSION")
    row = find(f"{name}/{version}")
    client = backend.client()
    before = _holder(client, name, alias)
    _give(client, name, alias, row["version"])
    if before is not None and before != row["version"]:
        _remember(client, name, alias, [*_earlier(client, name, alias), before])
    return {"name": name, "version": row["version"], "alias": alias, "before": before}


@backend.explaining()
def rollback(name: str, alias: str = CHAMPION) -> dict[str, str | None]:
    """Give an alias back to the version that had it before the last promotion; again, and it goes one further back."""
    _check_bare(name, "rollback NAME")
    find(name)
    client = backend.client()
    now, there = _holder(client, name, alias), {row["version"] for row in _rows(client, name)}
    earlier = [version for version in _earlier(client, name, alias) if version in there]
    if not earlier:
        raise RegistryError(
            f"no version of {name} is known to have had the alias {alias} before" + (f" version {now}" if now else ""),
            f"name one: rayward models promote {name} VERSION --alias {alias}",
        )
    _give(client, name, alias, earlier[-1])
    _remember(client, name, alias, earlier[:-1])
    return {"name": name, "version": earlier[-1], "alias": alias, "before": now}


def _check_bare(name: str, right: str) -> None:
    if "@" in name or "/" in name:
        raise RegistryError(f"{name} is not the bare name of a model", f"write: {right}")


def _holder(client: Any, name: str, alias: str) -> str | None:
    """The version that has an alias."""
    held = client.get_registered_model(name).aliases.get(alias)
    return None if held is None else str(held)


def _give(client: Any, name: str, alias: str, version: str) -> None:
    try:
        client.set_registered_model_alias(name, alias, version)
    except backend.mlflow().MlflowException as error:
        raise RegistryError(f"alias {alias!r} cannot be given: {error.message}", "use letters, digits, - and _, e.g. champion") from None


def _earlier(client: Any, name: str, alias: str) -> list[str]:
    """The versions that had an alias before, oldest first."""
    return str(client.get_registered_model(name).tags.get(BEFORE + alias) or "").split()


def _remember(client: Any, name: str, alias: str, versions: list[str]) -> None:
    client.set_registered_model_tag(name, BEFORE + alias, " ".join(versions[-100:]))


@backend.explaining()
def tag(name: str, version: str, tags: Mapping[str, Any]) -> None:
    """Add words to a version."""
    _tag(backend.client(), name, version, tags)


def _tag(client: Any, name: str, version: str, tags: Mapping[str, Any]) -> None:
    for key, value in tags.items():
        client.set_model_version_tag(name, version, re.sub(r"[^\w. -]", "_", key), public(str(value))[:5000])


def model_folder(model: str) -> Path:
    """The folder of a model named by a path or by models:/NAME@ALIAS, models:/NAME/VERSION, models:/NAME.

    A registered model whose files are on this disk stays where it is; else it is fetched into the cache (places.cache), once.

    Raises:
        RegistryError: if there is no such version, or its files are not where the registry says.
    """
    if not model.startswith("models:/"):
        return places.fetch(model)
    row = find(model)
    version = f"models:/{row['name']}/{row['version']}"
    with backend.explaining():
        source = str(backend.client().get_model_version_download_uri(row["name"], row["version"]))
    parts = urlsplit(source)
    if parts.scheme in ("", "file"):
        here = Path(url2pathname(parts.path) if parts.scheme else source) / INSIDE
        if not here.is_dir():
            raise RegistryError(
                f"{version} is registered as {here}, and that folder is not here",
                "read it where that folder is, or let the tracking server keep files itself: mlflow server --artifacts-destination PLACE",
            )
        return here

    def download(aside: Path) -> bool:
        with tempfile.TemporaryDirectory(dir=aside.parent.parent) as scratch, backend.explaining(), backend.no_chatter():
            os.rename(backend.mlflow().artifacts.download_artifacts(f"{version}/{INSIDE}", dst_path=scratch), aside)
        return aside.is_dir()

    with places.telling(places.cache()):
        fetched = places.fetched("\n".join((backend.address(), version, row["run_id"], public(source))), "model", download)
    if fetched is None:
        raise RegistryError(f"{version} holds no model of Rayward's", "register one with train_reward_model --register NAME")
    return fetched


def model_address(model: str) -> str:
    """What every worker loads a model by: a URL as it is, a folder by its absolute path, `tiny` and names on the hub as they are.

    A registered version is fetched from the registry to this machine's disk: workers elsewhere need it at a URL. It is another path after
    the cache was emptied: what is to be the same next time goes by `pinned`.
    """
    if model == "tiny" or places.is_remote(model):
        return model if model == "tiny" else str(places.at(model))
    folder = model_folder(model)
    return str(folder.absolute()) if folder.is_dir() else model


def pinned(model: str) -> str:
    """What leads back to a model: models:/NAME/VERSION of a registered one, also when its alias has moved on; else its address."""
    if not model.startswith("models:/"):
        return model_address(model)
    row = find(model)
    return f"models:/{row['name']}/{row['version']}"


def identity(model: str) -> dict[str, Any]:
    """What a manifest says about a model: its name, and the version or the digest of its weights."""
    if model.startswith("models:/"):
        row = find(model)
        return {"model": f"models:/{row['name']}/{row['version']}", "run_id": row["run_id"]}
    weights = sorted(places.fetch(model).glob("*.safetensors"))
    if not weights:
        raise RegistryError(
            f"{model} holds no model", "give the folder that train_reward_model wrote (OUTPUT/model), or models:/NAME@ALIAS"
        )
    digest = hashlib.sha256()
    for path in weights:
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)  # in pieces: a shard may be larger than the memory
    return {"model": model, "sha256": digest.hexdigest()}
