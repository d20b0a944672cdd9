"""What a job takes along: the script, the files it needs, and in a checkout the package; a folder of at most a few MB.

    label_pairs.py          the script; for one of the user's own also the modules beside it that it imports
    configs/0/pairs.yaml    what --config FILE names
    rayward/                the package and its scripts, from a checkout: what runs there is the code that lies here
    .environment            variables that must not be seen (--env): Ray shows a job's environment to whoever looks at the job

Ray names the folder by a digest of all that is in it and unpacks it on every node, where it comes first on the Python path, so edited code
is never taken for the code of yesterday. `store/`, `.git`, `.venv` and their like are never sent.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rayward.errors import SettingsError

MOST_BYTES = 8 * 2**20  # of all that is sent, before it is compressed
NEVER = {"store", "venv", "__pycache__", "node_modules", "mlruns"}  # and whatever starts with a dot
PRIVATE = ".environment"
HOOK = "rayward.cluster.shipping.take_environment"


@dataclass(frozen=True)
class Word:
    """A word of the command; `sent` words are paths inside the folder that is sent."""

    text: str
    sent: bool = False


def files_of(path: Path) -> Iterator[Path]:
    """Every file below a folder, or the file itself, but nothing that is never sent."""
    if path.is_file():
        yield path
        return
    for folder, folders, names in os.walk(path):
        folders[:] = sorted(name for name in folders if name not in NEVER and not name.startswith("."))
        yield from (Path(folder) / name for name in sorted(names) if not name.startswith("."))


def imported(script: Path) -> list[Path]:
    """The modules and packages beside a script that it imports, and those that they import."""
    found: list[Path] = []
    todo = [script]
    while todo:
        try:
            tree = ast.parse(todo.pop().read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):  # the interpreter says it better
            continue
        for name in _names(tree):
            for path in (script.parent / f"{name}.py", script.parent / name):
                if path not in found and path != script and (path.is_file() or (path / "__init__.py").is_file()):
                    found.append(path)
                    todo += [file for file in files_of(path) if file.suffix == ".py"]
    return sorted(found)


def _names(tree: ast.Module) -> set[str]:
    """The first parts of all names that a module imports."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names


def take_configs(words: Sequence[str]) -> tuple[list[Word], dict[str, Path]]:
    """The words as the job hears them, and what has to be sent under which name: the files that --config names.

    >>> take_configs(["--config", "a/pairs.yaml", "--votes"])[1]
    {'configs/0/pairs.yaml': PosixPath('a/pairs.yaml')}
    """
    heard: list[Word] = []
    files: dict[str, Path] = {}
    for at, word in enumerate(words):
        option, equals, value = word.partition("=")
        if option == "--config" and equals:
            heard.append(Word("--config"))
        elif at and words[at - 1] == "--config":
            value = word
        else:
            heard.append(Word(word))
            continue
        name = f"configs/{len(files)}/{Path(value).name}"
        files[name] = Path(value)
        heard.append(Word(name, sent=True))
    return heard, files


def package_files(package: Path, scripts: Mapping[str, Sequence[Path]]) -> dict[str, Path]:
    """The package's files and its scripts under the names they have in a wheel."""
    files = {f"rayward/{path.relative_to(package)}": path for path in files_of(package)}
    for kind, paths in scripts.items():
        files |= {f"rayward/scripts/{kind}/{path.name}": path for path in paths}
    return files


def extra_files(paths: Sequence[Path]) -> dict[str, Path]:
    """What --ship names, under its own name (of a link: the link's)."""
    files: dict[str, Path] = {}
    for path in paths:
        if not path.exists():
            raise SettingsError(f"--ship {path} does not exist", "give a file or a folder of modules that the script imports")
        root = Path(os.path.abspath(path.expanduser()))
        files = joined(files, {str(root.name / file.relative_to(root)): file for file in files_of(root)})
    return files


def joined(*parts: Mapping[str, Path]) -> dict[str, Path]:
    """All files under their names, or SettingsError where two of them would lie at the same place."""
    files: dict[str, Path] = {}
    for name, path in (pair for part in parts for pair in part.items()):
        if name in files and not files[name].samefile(path):
            raise SettingsError(f"{files[name]} and {path} would both be sent as {name}", "rename one, or ship the folder that it lies in")
        files[name] = path
    return files


def digest_of(words: Sequence[str], files: Mapping[str, Path], where: Mapping[str, str]) -> str:
    """Eight hex digits of what a command is: its words, the content of its files, and what relative names in it mean."""
    digest = hashlib.blake2b(digest_size=4)
    digest.update(json.dumps([list(words), sorted(where.items())]).encode())
    for name in sorted(files):
        digest.update(name.encode() + b"\0" + hashlib.blake2b(files[name].read_bytes()).digest())
    return digest.hexdigest()


def size_of(files: Mapping[str, Path]) -> int:
    """Bytes of all files, or SettingsError where that is more than is sent."""
    sizes = {name: path.stat().st_size for name, path in files.items()}
    total = sum(sizes.values())
    if total > MOST_BYTES:
        largest = sorted(sizes, key=lambda name: -sizes[name])[:3]
        named = ", ".join(f"{name} ({sizes[name] / 2**20:.1f} MB)" for name in largest)
        raise SettingsError(
            f"{total / 2**20:.1f} MB would be sent with this job, and {MOST_BYTES // 2**20} MB is the most; the largest: {named}",
            "data belongs into an object store or a shared folder, large code into the cluster's image",
        )
    return total


def pack(folder: Path, files: Mapping[str, Path], private: Mapping[str, str]) -> None:
    """Lay everything into an empty folder."""
    for name, path in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / name)
    if private:
        lines = [f"export {name}={shlex.quote(value)}\n" for name, value in sorted(private.items())]  # the entry process's shell reads it
        (folder / PRIVATE).touch(mode=0o600)  # which Ray keeps when it unpacks
        (folder / PRIVATE).write_text("".join(lines), encoding="utf-8")


def take_environment() -> None:
    """Ray calls this first in every worker of a job that came with private variables: they are there before anything looks at them."""
    for folder in (os.environ.get("PYTHONPATH") or "").split(os.pathsep):
        file = Path(folder) / PRIVATE
        if folder and file.is_file():
            words = shlex.split(file.read_text(encoding="utf-8"))
            os.environ.update(dict(word.split("=", 1) for word in words if word != "export"))
            return
