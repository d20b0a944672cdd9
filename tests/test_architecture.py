"""The shape of the project: what the tree promises, what may import what, what every script has, and that documented commands exist."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import itertools
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import pytest
import typer.main

from driving import ROOT, Said, rayward
from rayward import cli
from rayward.config import convert, field_help
from rayward.errors import SettingsError

PACKAGE = ROOT / "platform" / "rayward"
MODULES = sorted(PACKAGE.rglob("*.py"))
SCRIPTS = sorted(cli.scripts().values())
HEAVY = ("torch", "ray", "mlflow", "transformers", "datasets", "pandas", "pyarrow")


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def python(code: str, cwd: Path = ROOT) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# --------------------------------------------------------------------------------------------------------------- the tree


def test_platform_stays_the_standard_librarys() -> None:
    assert not (ROOT / "platform" / "__init__.py").exists()
    assert python("import platform; print(platform.__file__, platform.python_version())").endswith(
        f"platform.py {'.'.join(map(str, sys.version_info[:3]))}"
    )


def test_the_tree_holds_the_scripts_that_ls_shows() -> None:
    assert {path.parent.name for path in SCRIPTS} == {"pipelines", "jobs"}
    assert len(SCRIPTS) == len(list(ROOT.glob("pipelines/*.py"))) + len(list(ROOT.glob("jobs/*.py"))) > 0


@pytest.mark.parametrize("path", [*MODULES, *SCRIPTS], ids=name)
def test_every_file_opens_with_its_story(path: Path) -> None:
    assert ast.get_docstring(tree(path))


# ------------------------------------------------------------------------------------------------------- what imports what


def imports(module: ast.Module) -> set[str]:
    """Top-level names of everything a file imports, inside functions too, and by name through importlib."""
    found: set[str] = set()
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            found |= {a.value.partition(".")[0] for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)}
    return found


def unsafe(module: ast.Module) -> list[str]:
    """Whatever in a file could run code that came with data or with a model."""
    found = [f"imports {m}" for m in imports(module) & {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}]
    for node in ast.walk(module):
        if isinstance(node, ast.Call):
            called, given = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
            if called in ("eval", "exec", "torch.save"):
                found.append(called)
            if called == "torch.load" and given.get("weights_only") != "True":
                found.append("torch.load without weights_only")
            found += [f"{k}=True" for k in ("trust_remote_code", "allow_pickle") if given.get(k) == "True"]
        elif isinstance(node, ast.Dict):
            pairs = zip(node.keys, node.values, strict=True)
            found += [
                "trust_remote_code: True" for k, v in pairs if k and ast.unparse(k) == "'trust_remote_code'" and ast.unparse(v) == "True"
            ]
        elif isinstance(node, ast.AnnAssign) and node.value and ast.unparse(node.target) == "trust_remote_code":
            found += ["trust_remote_code = True"] if ast.unparse(node.value) == "True" else []
    return found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "def f():\n    from cloudpickle import loads",
        "import importlib\nimportlib.import_module('pickle')",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "options = {'trust_remote_code': True}",
        "class S:\n    trust_remote_code: bool = True",
        "np.load(path, allow_pickle=True)",
    ],
)
def test_the_scan_sees_what_it_looks_for(source: str) -> None:
    assert unsafe(ast.parse(source))


@pytest.mark.parametrize("path", [*MODULES, *SCRIPTS], ids=name)
def test_nothing_runs_code_that_came_with_data(path: Path) -> None:
    assert unsafe(tree(path)) == []


@pytest.mark.parametrize(
    ("library", "homes"),
    [
        ("mlflow", ("registry/",)),
        ("ray", ("cluster/", "dataflow/engine.py", "fitting", "policies/engine.py")),
    ],
)
def test_one_place_knows_a_library(library: str, homes: tuple[str, ...]) -> None:
    users = {str(path.relative_to(PACKAGE)) for path in MODULES if library in imports(tree(path))}
    assert users
    assert [user for user in sorted(users) if not user.startswith(homes)] == []
    assert not [path.name for path in SCRIPTS if library in imports(tree(path))]


def test_help_costs_no_heavy_import() -> None:
    code = f"import sys, rayward, rayward.cli; print([m for m in {HEAVY} if m in sys.modules])"
    assert python(code) == "[]"


# -------------------------------------------------------------------------------------------------------------- the scripts


class Script(NamedTuple):
    """A script and its settings class."""

    path: Path
    settings: Any


def load(path: Path) -> Script:
    """A script, imported as what it is: a file."""
    spec = importlib.util.spec_from_file_location(f"script_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and inspect look their classes up there
    spec.loader.exec_module(module)
    return Script(path, next(iter(get_type_hints(module.main).values())))


@pytest.fixture(scope="module")
def scripts() -> dict[str, Script]:
    return {path.stem: load(path) for path in SCRIPTS}


def options(cls: Any, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """(dotted name, type, help) of every setting, nested ones too."""
    hints, said = get_type_hints(cls), field_help(cls)
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from options(hints[field.name], f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, hints[field.name], said.get(field.name, "")


def few_groups(cls: Any) -> bool:
    """Whether a script has one or two groups of nested settings, whose fields are options too."""
    return sum(dataclasses.is_dataclass(kind) for kind in get_type_hints(cls).values()) <= 2


@pytest.mark.parametrize("path", SCRIPTS, ids=name)
def test_a_script_is_one_story_that_ends_in_a_command(path: Path, scripts: dict[str, Script]) -> None:
    assert 30 <= len(path.read_text(encoding="utf-8").splitlines()) <= 160
    assert ast.unparse(tree(path).body[-1]) == "if __name__ == '__main__':\n    command(main)"
    settings = scripts[path.stem].settings
    assert settings.__module__ == f"script_{path.stem}"
    assert settings.__dataclass_params__.frozen


@pytest.mark.parametrize("path", SCRIPTS, ids=name)
def test_every_setting_of_a_script_says_what_it_is(path: Path, scripts: dict[str, Script]) -> None:
    assert [option for option, _, said in options(scripts[path.stem].settings) if not said] == []


@pytest.fixture(scope="module")
def helps() -> dict[str, Said]:
    """What every script says to --help, as a user asks for it."""
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(cli.scripts(), pool.map(lambda n: rayward("run", n, "--help", cwd=ROOT), cli.scripts()), strict=True))


@pytest.mark.parametrize("script", cli.scripts())
def test_every_script_answers_help(script: str, helps: dict[str, Said], scripts: dict[str, Script]) -> None:
    said = helps[script]
    assert said.code == 0
    assert said.err == ""
    assert cli.first_line(scripts[script].path)[:60] in said.out
    for option, _, _ in options(scripts[script].settings):
        flag = "--" + option.rpartition(".")[2].replace("_", "-")
        assert "--set " + option in said.out or (flag in said.out and ("." not in option or few_groups(scripts[script].settings)))


# ------------------------------------------------------------------------------------------------------ documented commands

WRITTEN = [
    *(*MODULES, *SCRIPTS, *ROOT.glob("*.md"), *ROOT.glob("*.yaml"), *sorted(ROOT.glob("benchmarks/*.py"))),
    *(path for folder in ("docs", "deploy") for path in sorted((ROOT / folder).rglob("*.*")) if path.suffix in (".md", ".yaml")),
]


def commands(text: str) -> Iterator[list[str]]:
    """The words behind `rayward` in every command of a text; a command ends with its line, a closing quote or a comment."""
    joined = re.sub(r"\\\n\s*", " ", text)
    for line in re.findall(r"(?:^|[`$\"]|  |: |e\.g\. )\s*rayward ((?:[a-z]|-h)[^\n`#\"]*)", joined, re.MULTILINE):
        try:
            yield shlex.split(line)
        except ValueError:  # an apostrophe of the prose behind it
            yield line.split()


def test_commands_are_found_in_prose_code_and_over_several_lines() -> None:
    text = "Say `rayward ls` first.\n    rayward run label_pairs --source S \\\n      --output O   # then\nrayward ui\nthe rayward package"
    assert list(commands(text)) == [["ls"], ["run", "label_pairs", "--source", "S", "--output", "O"], ["ui"]]


def wrong(words: list[str], scripts: dict[str, Script]) -> list[str]:
    """What in a documented command does not exist."""
    if words[0] == "quickstart":
        words = ["run", *words]
    if words[0] == "run":
        return wrong_run(words[1:], scripts)
    if words[0] == "submit":  # its own options, a script's name, the script's options
        at = next((at for at, word in enumerate(words) if word in scripts), 0)
        words, script = words[: at or None], words[at:] if at else []
        if script and (bad := wrong_run(script, scripts)):
            return bad
    command: Any = typer.main.get_command(cli.app)
    for at, word in enumerate(words):
        if hasattr(command, "commands"):
            if word not in command.commands:
                return [word] if not word.startswith("-") else []
            command, rest = command.commands[word], words[at + 1 :]
    known = {o for p in command.params for o in (*p.opts, *p.secondary_opts)} | {"--help", "-h"}
    return [w for w in rest if w.startswith("--") and w.partition("=")[0] not in known]


def wrong_run(words: list[str], scripts: dict[str, Script]) -> list[str]:
    script = words[0].strip(",.;:") if words else ""
    if not re.fullmatch(r"[a-z_]+", script):
        return []  # NAME, or the path of the user's own
    if script not in scripts:
        return [script]
    kinds = {option: kind for option, kind, _ in options(scripts[script].settings)}
    named = {o.rpartition(".")[2] if few_groups(scripts[script].settings) else o: kind for o, kind in kinds.items()}
    known = {"--" + o.replace("_", "-") for o in named} | {"--no-" + o.replace("_", "-") for o, k in named.items() if k is bool}
    known |= {"--help", "-h", "--config", "--set", "--dry-run"}
    bad = [w for w in words if w.startswith("--") and w not in known]
    for flag, value in itertools.pairwise(words):
        if flag == "--set":
            setting, _, given = value.partition("=")
            if setting not in kinds:
                bad.append(value)
            elif re.search(r"[a-z0-9]", given):  # not a placeholder
                try:
                    convert(kinds[setting], given.strip("."), setting)
                except SettingsError as error:
                    bad.append(str(error))
    return bad


@pytest.mark.parametrize(
    ("command", "found"),
    [
        ("run label_pair --source S", ["label_pair"]),
        ("run label_pairs --sorce S", ["--sorce"]),
        ("run label_pairs --set label.chose=all", ["label.chose=all"]),
        ("run label_pairs --set label.min_gap=much", ["label.min_gap='much' is not a number"]),
        ("models lst", ["lst"]),
        ("models list --jsn", ["--jsn"]),
        ("run label_pairs --no-overwrite --set label.min_gap=1 --dry-run", []),
        ("run NAME --help", []),
        ("run label_pairs --votes --min-agreement 0.6", []),
        ("run train_reward_model --max-length 5", ["--max-length"]),
        ("quickstart --engine local", []),
        ("submit --no-wait label_pairs --sorce S", ["--sorce"]),
        ("submit --no-weight label_pairs --source S", ["--no-weight"]),
        ("submit --no-wait label_pairs --source S", []),
    ],
)
def test_a_wrong_command_in_the_docs_would_be_seen(command: str, found: list[str], scripts: dict[str, Script]) -> None:
    assert wrong(command.split(), scripts) == found


@pytest.mark.parametrize("path", WRITTEN, ids=name)
def test_documented_commands_exist(path: Path, scripts: dict[str, Script]) -> None:
    assert [bad for words in commands(path.read_text(encoding="utf-8")) for bad in wrong(words, scripts)] == []


@pytest.mark.parametrize("script", cli.scripts())
def test_a_script_shows_the_command_that_runs_it(script: str, scripts: dict[str, Script]) -> None:
    shown = [" ".join(words).removeprefix("run ") for words in commands(ast.get_docstring(tree(scripts[script].path)) or "")]
    assert [command for command in shown if command.startswith(script)]


def test_make_targets_in_the_docs_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    pages = [path.read_text(encoding="utf-8") for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"))]
    asked = {target for page in pages for target in re.findall(r"(?:^\s*|`)make ([a-z][a-z-]*)", page, re.MULTILINE)}
    assert targets
    assert asked <= targets
