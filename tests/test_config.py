"""Settings: plain values become typed settings, what was said last wins, a mistake is one message with a way out and exit code 2.

The command is tested as a user meets it: a small script in a process of its own.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_type_hints

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from rayward.cli import scripts
from rayward.config import AUTO, as_dict, choose, convert, field_help, flatten, merge, parse_sets, read_file, resolve, suggest
from rayward.errors import SettingsError


@dataclass(frozen=True)
class Render:
    """Nested settings."""

    max_length: int = 512  # tokens of prompt and answer
    side: Literal["left", "right"] = "left"  # where it is cut

    def __post_init__(self) -> None:
        if self.max_length < 1:
            raise ValueError(f"max_length={self.max_length} must be at least 1")


@dataclass(frozen=True)
class Train:
    """Settings of every kind."""

    source: str  # folder of examples
    lr: float = 1e-4  # step size at the top,
    # in units of nothing
    epochs: int = 3
    shuffle: bool = True  # another order every epoch
    note: str | None = None  # a word for the log
    limit: int | None = None
    names: tuple[str, ...] = ("a", "b")  # what is trained
    widths: tuple[int, ...] = field(default_factory=lambda: (8, 16))
    render: Render = Render()  # how text becomes tokens
    other: Render | None = None


# ----------------------------------------------------------------------------------------------------------------- convert


@pytest.mark.parametrize(
    ("kind", "value", "converted"),
    [
        (int, "3", 3),
        (int, 3.0, 3),
        (int, "1e3", 1_000),
        (int, "-2", -2),
        (int, 2**63 + 1, 2**63 + 1),
        (int, str(2**53 + 1), 2**53 + 1),  # a seed that a float cannot hold
        (float, "1e-4", 1e-4),
        (float, 3, 3.0),
        (float, "inf", float("inf")),
        (bool, True, True),
        (bool, "yes", True),
        (bool, "Off", False),
        (bool, 0, False),
        (str, "text", "text"),
        (str, 3, "3"),
        (str, "", ""),
        (str | None, None, None),
        (str | None, "none", None),
        (int | None, "null", None),
        (int | None, "5", 5),
        (tuple[int, ...], "1,2", (1, 2)),
        (tuple[int, ...], [1, "2"], (1, 2)),
        (tuple[int, ...], "", ()),
        (tuple[int, ...], 64, (64,)),  # --set widths=64, which YAML reads as a number
        (tuple[str, ...] | None, "a", ("a",)),
        (Literal["left", "right"], "left", "left"),
        (Literal[1, 2], 2, 2),
        (Render, {"max_length": "7"}, Render(7)),
        (Render, Render(7), Render(7)),
        (Render | None, None, None),
        (Render | None, {"side": "right"}, Render(side="right")),
    ],
)
def test_a_plain_value_becomes_what_the_setting_is(kind: Any, value: object, converted: object) -> None:
    made = convert(kind, value, "x")
    assert made == converted
    assert type(made) is type(converted)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (int, "3.5"),
        (int, "three"),
        (int, True),
        (int, None),
        (int, ""),
        (int, "inf"),
        (int, float("nan")),
        (int, [1]),
        (float, "1,5"),
        (float, False),
        (float, {}),
        (bool, "perhaps"),
        (bool, 2),
        (bool, None),
        (str, None),  # an empty value of a YAML file is no text "None"
        (str, ["a"]),
        (str, {"a": 1}),
        (Literal["left", "right"], "lef"),
        (Literal["left", "right"], ["left"]),
        (tuple[int, ...], "1,x"),
        (tuple[int, ...], [[1]]),
        (tuple[int, ...], None),
        (tuple[int, ...], {"a": 1}),
        (Render, "left"),
        (Render, None),
        (Render, {"max_length": 0}),
        (int | None, "many"),
    ],
)
def test_a_value_that_does_not_fit_is_named(kind: Any, value: object) -> None:
    with pytest.raises(SettingsError, match=r"group\.x"):
        convert(kind, value, "group.x")


# ----------------------------------------------------------------------------------------------------------------- resolve


def test_settings_resolve_with_their_defaults_and_nested_groups() -> None:
    assert resolve(Train, {"source": "s"}) == Train(source="s")
    given_values = {"source": "s", "lr": "0.1", "render": {"side": "right"}, "other": {"max_length": 3}, "names": "x,y", "note": None}
    assert resolve(Train, given_values) == Train(
        source="s", lr=0.1, render=Render(side="right"), other=Render(max_length=3), names=("x", "y")
    )


@pytest.mark.parametrize(
    ("given_values", "what", "way_out"),
    [
        ({}, "missing: source", "--source"),
        ({"source": "s", "epoch": 3}, "epoch is not a setting", "did you mean epochs?"),
        ({"source": "s", "render": {"max_lenght": 3}}, "render.max_lenght is not a setting", "did you mean max_length?"),
        ({"source": "s", "render": {"side": "lift"}}, "render.side='lift'", "did you mean left?"),
        ({"source": "s", "render": {"max_length": 0}}, "max_length=0 must be at least 1", ""),
        ({"source": "s", "render": 5}, "render=5 is a group of settings", "render.NAME=VALUE"),
        ({"source": "s", 3: 4}, "3 is not a setting", "Known:"),
        ({"source": "s", True: 4}, "True is not a setting", "Known:"),  # `on: 4` in YAML
        ({"source": "s", None: 4}, "None is not a setting", "Known:"),
    ],
)
def test_a_mistake_names_the_setting_and_the_way_out(given_values: dict[Any, Any], what: str, way_out: str) -> None:
    with pytest.raises(SettingsError) as error:
        resolve(Train, given_values)
    assert what in error.value.what
    assert way_out in error.value.way_out


SOME_TRAINS = st.builds(
    Train,
    source=st.text("abc /.:#-0", min_size=1) | st.sampled_from(["null", "true", "1e3", "- a", "é", "no"]),
    lr=st.floats(allow_nan=False),
    epochs=st.integers(-(2**70), 2**70),
    shuffle=st.booleans(),
    note=st.none() | st.sampled_from(["a word", "1", "yes", "2024-01-01", "~x", "\u2028", "a: b"]),
    limit=st.none() | st.integers(-5, 5),
    names=st.lists(st.sampled_from(["a", "b,c", "yes", "1"])).map(tuple),
    widths=st.lists(st.integers()).map(tuple),
    render=st.builds(Render, max_length=st.integers(1, 9), side=st.sampled_from(["left", "right"])),
    other=st.none() | st.builds(Render, max_length=st.integers(1, 9)),
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(SOME_TRAINS)
def test_settings_go_through_yaml_and_back(train: Train) -> None:
    written = yaml.safe_dump(as_dict(train), sort_keys=False, allow_unicode=True)
    assert resolve(Train, yaml.safe_load(written)) == train


# ---------------------------------------------------------------------------------------------------- merge, sets, names


def test_what_is_laid_on_top_wins_group_by_group() -> None:
    base = {"a": {"x": 1, "y": {"z": 2}}, "b": 3}
    assert merge(base, {"a": {"y": {"z": 4}}}) == {"a": {"x": 1, "y": {"z": 4}}, "b": 3}
    assert merge(base, {"a": 5, "b": {"c": 6}}) == {"a": 5, "b": {"c": 6}}
    assert merge(base, {}) == base == {"a": {"x": 1, "y": {"z": 2}}, "b": 3}


@pytest.mark.parametrize(
    ("words", "given_values"),
    [
        ([], {}),
        (["a=1", "b.c=true", "b.d=null"], {"a": 1, "b": {"c": True, "d": None}}),
        (["a=x=y"], {"a": "x=y"}),
        (["a="], {"a": ""}),
        (["a=1", "a=2"], {"a": 2}),
        (["a=[1, 2]"], {"a": [1, 2]}),
        (["a=[1, 2"], {"a": "[1, 2"}),
        (["a.b=1", "a.c.d=2", "a.b=3"], {"a": {"b": 3, "c": {"d": 2}}}),
        (["a={b: 1}", "a.c=2"], {"a": {"b": 1, "c": 2}}),
        (["a=hello world"], {"a": "hello world"}),
        (["a=C:/x"], {"a": "C:/x"}),
    ],
)
def test_set_words_become_nested_values(words: list[str], given_values: dict[str, Any]) -> None:
    assert parse_sets(words) == given_values


@pytest.mark.parametrize("word", ["a", "=3", "", "a.b"])
def test_a_set_word_without_name_and_value_is_refused(word: str) -> None:
    with pytest.raises(SettingsError, match="name=value"):
        parse_sets([word])


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.dictionaries(st.sampled_from("abc"), st.integers() | st.dictionaries(st.sampled_from("xyz"), st.integers(), min_size=1)))
def test_flat_names_are_what_set_takes(nested: dict[str, Any]) -> None:
    assert parse_sets([f"{name}={value}" for name, value in flatten(nested).items()]) == nested


def test_an_unknown_name_gets_a_suggestion() -> None:
    assert suggest("pars", ["pairs", "steps"]) == "did you mean pairs? Known: pairs, steps"
    assert suggest("zzz", ["pairs"]) == "Known: pairs"
    with pytest.raises(SettingsError, match="did you mean pairs"):
        choose({"pairs": 1}, "pars", "labeler")


@pytest.mark.parametrize("name", ["no_such_module:x", "math:no_such_name", "math:", ":x", "a b:c", ".:x"])
def test_a_name_of_ones_own_that_cannot_be_imported_is_a_users_mistake(name: str) -> None:
    with pytest.raises(SettingsError, match="objective="):
        choose({}, name, "objective")


def test_the_comment_behind_a_field_is_its_help() -> None:
    helps = field_help(Train)
    assert helps["source"] == "folder of examples"
    assert helps["lr"] == "step size at the top, in units of nothing"
    assert "epochs" not in helps
    assert helps["render"] == "how text becomes tokens"
    assert field_help(Render) == {"max_length": "tokens of prompt and answer", "side": "where it is cut"}


@pytest.mark.parametrize("content", ["", "# nothing\n"])
def test_an_empty_file_of_settings_is_no_settings(content: str, tmp_path: Path) -> None:
    (tmp_path / "some.yaml").write_text(content)
    assert read_file(str(tmp_path / "some.yaml")) == {}


# ------------------------------------------------------------------------------------------------------------- the command

SCRIPT = '''
"""Try settings out.

    rayward run try.py --source S
"""

from dataclasses import dataclass
from typing import Literal

from rayward.config import as_dict, command
from rayward.errors import DataError, Interrupted


@dataclass(frozen=True)
class Render:
    max_length: int = 512  # tokens of prompt and answer
    side: Literal["left", "right"] = "left"


@dataclass(frozen=True)
class Settings:
    source: str  # folder of examples
    epochs: int = 3  # times over the data
    lr: float = 1e-05
    names: tuple[str, ...] = ("a",)
    note: str | None = None
    shuffle: bool = True  # another order every epoch
    engine: Literal["auto", "local"] = "auto"
    render: Render = Render()
    wait_s: float = -1.0  # seconds


def main(settings: Settings) -> None:
    """Say the settings, or fail as the source says."""
    if settings.source == "bad data":
        raise DataError("the data is bad", "mend it")
    if settings.source == "interrupted":
        raise Interrupted("step 3 is kept")
    if settings.source == "ctrl-c":
        raise KeyboardInterrupt
    print(as_dict(settings))


if __name__ == "__main__":
    command(main)
'''


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("script")
    (folder / "try.py").write_text(SCRIPT)
    (folder / "some.yaml").write_text("source: from file\nepochs: 7\nlr: 0.5\nrender:\n  max_length: 64\n  side: right\n")
    (folder / "list.yaml").write_text("- 1\n")
    (folder / "broken.yaml").write_text("a: [1\n")
    (folder / "latin.yaml").write_bytes(b"source: \xe9\n")
    (folder / "unknown.yaml").write_text("source: s\nepoch: 3\n")
    (folder / "on.yaml").write_text("source: s\non: 3\n")
    (folder / "empty.yaml").write_text("source:\n")
    return folder / "try.py"


def run(script: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "RAYWARD_TRACEBACK"}
    command = [sys.executable, str(script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=script.parent, env=environment, timeout=60, check=False)


def said(script: Path, *arguments: str) -> dict[str, Any]:
    """The settings that a command ends up with, as it prints them."""
    done = run(script, *arguments, "--dry-run")
    assert done.returncode == 0, done.stderr
    return yaml.safe_load(done.stdout)


def test_what_is_said_last_wins(script: Path) -> None:
    default = {"names": ["a"], "note": None, "shuffle": True, "engine": "auto", "wait_s": -1.0}
    file = ["--config", "some.yaml"]
    sets = ["--set", "epochs=8", "--set", "lr=0.25", "--set", "render.max_length=32"]
    assert said(script, "--source", "s") == {
        **default,
        "source": "s",
        "epochs": 3,
        "lr": 1e-05,
        "render": {"max_length": 512, "side": "left"},
    }
    assert said(script, *file) == {
        **default,
        "source": "from file",
        "epochs": 7,
        "lr": 0.5,
        "render": {"max_length": 64, "side": "right"},
    }
    assert said(script, *file, *sets) == {
        **default,
        "source": "from file",
        "epochs": 8,
        "lr": 0.25,
        "render": {"max_length": 32, "side": "right"},
    }
    options = ["--epochs", "9", "--no-shuffle", "--names", "x,y", "--note", "hi"]
    assert said(script, *options, *file, *sets) == {
        **default,
        "source": "from file",
        "epochs": 9,
        "lr": 0.25,
        "shuffle": False,
        "names": ["x", "y"],
        "note": "hi",
        "render": {"max_length": 32, "side": "right"},
    }


def test_a_dry_run_can_be_fed_back(script: Path) -> None:
    arguments = ["--source", "null", "--lr", "3e-7", "--note", "yes: no", "--names", "a,1", "--set", "render.side=right"]
    dry = run(script, *arguments, "--dry-run").stdout
    (script.parent / "again.yaml").write_text(dry)
    assert run(script, "--config", "again.yaml", "--dry-run").stdout == dry
    real = run(script, "--config", "again.yaml")
    assert (real.returncode, real.stdout) == (0, run(script, *arguments).stdout)
    assert "'source': 'null'" in real.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "missing: source"),
        (["--source", "s", "--set", "epoch=3"], "did you mean epochs?"),
        (["--source", "s", "--set", "render.sid=3"], "did you mean side?"),
        (["--source", "s", "--epochs", "many"], "epochs='many' is not a whole number"),
        (["--source", "s", "--set", "shuffle=maybe"], "shuffle='maybe'"),
        (["--source", "s", "--engine", "lokal"], "did you mean local?"),
        (["--source", "s", "--set", "epochs"], "name=value"),
        (["--source", "s", "--set", "names=3", "--set", "render=3"], "render=3 is a group of settings"),
        (["--epoch", "3"], "--epochs"),
        (["--source"], "--source"),
        (["--config", "missing.yaml"], "missing.yaml cannot be read"),
        (["--config", "."], "--config . cannot be read"),
        (["--config", "list.yaml"], "holds a list"),
        (["--config", "broken.yaml"], "is not YAML"),
        (["--config", "latin.yaml"], "is not YAML"),
        (["--config", "unknown.yaml"], "did you mean epochs?"),
        (["--config", "on.yaml"], "True is not a setting"),
        (["--config", "empty.yaml"], "source"),
        (["--source", "bad data"], "error: the data is bad\n  -> mend it"),
    ],
)
def test_a_users_mistake_is_one_message_and_exit_code_2(script: Path, arguments: list[str], message: str) -> None:
    done = run(script, *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(("source", "message"), [("interrupted", "stopped: step 3 is kept"), ("ctrl-c", "stopped: ")])
def test_a_run_that_the_user_stops_says_so_and_exits_with_130(script: Path, source: str, message: str) -> None:
    done = run(script, "--source", source)
    assert done.returncode == 130
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_help_says_every_setting_with_its_comment_and_default(script: Path) -> None:
    text = " ".join(run(script, "--help").stdout.split())
    for words in (
        "Try settings out.",
        "folder of examples [required]",
        "times over the data [default: 3]",
        "--source <DIR> folder of examples [required]",
        "--epochs <int> times over the data [default: 3]",
        "--lr <float> [default: 1e-05]",
        "--names <text,...> [default: a]",
        "--note <text>|none",
        "--shuffle / --no-shuffle another order every epoch [default: true]",
        "--engine auto|local [default: auto]",
        "--max-length <int> tokens of prompt and answer [default: 512]",
        "--wait-s <float>|auto seconds [default: auto]",
        "--config <FILE>",
        "--dry-run",
    ):
        assert words in text


def script_settings(name: str) -> Any:
    """The settings class of a script."""
    spec = importlib.util.spec_from_file_location(f"try_{name}", scripts()[name])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.Settings


def test_auto_is_the_number_that_says_so() -> None:
    """Every entry of the table is a number setting of a script, whose help says what the number does; the word resolves to it."""
    said: dict[str, tuple[Any, str]] = {}
    for name in ("train_reward_model", "sample_rollouts", "score_rollouts"):
        cls = script_settings(name)
        hints = get_type_hints(cls)
        groups = {"": cls} | {f"{n}.": kind for n, kind in hints.items() if is_dataclass(kind)}
        for prefix, group in groups.items():
            said |= {prefix + n: (kind, field_help(group).get(n, "")) for n, kind in get_type_hints(group).items()}
    for setting, number in AUTO.items():
        kind, text = said[setting]
        assert kind in (int, float)
        assert f"{number}: " in text, setting
        assert convert(kind, "auto", setting) == convert(kind, number, setting) == number
        assert type(convert(kind, "auto", setting)) is kind
        with pytest.raises(SettingsError, match=f"{setting}='automatic' is not a (whole )?number or auto"):
            convert(kind, "automatic", setting)
    with pytest.raises(SettingsError, match=r"train\.epochs='auto' is not a whole number$"):
        convert(int, "auto", "train.epochs")


def test_auto_changes_no_digest() -> None:
    job = script_settings("train_reward_model")
    given: dict[str, Any] = {"examples": "e", "output": "o", "lora": {"rank": 8}}
    words = ["batch.micro_tokens=auto", "train.validate_every=auto", "lora.alpha=auto", "gpus_per_worker=auto"]
    numbers = ["batch.micro_tokens=0", "train.validate_every=0", "lora.alpha=0", "gpus_per_worker=-1"]
    one, two = (resolve(job, merge(given, parse_sets(sets))) for sets in (words, numbers))
    assert one == two
    assert as_dict(one) == as_dict(two)


def test_the_fields_of_the_one_group_of_nested_settings_are_options_too(script: Path) -> None:
    done = run(script, "--source", "s", "--max-length", "7", "--dry-run")
    assert "max_length: 7" in done.stdout, done.stderr
    last = run(script, "--source", "s", "--max-length", "7", "--set", "render.max_length=8", "--dry-run")
    assert "max_length: 7" in last.stdout  # the named option is said last


def test_the_command_line_names_what_it_does_not_know() -> None:
    command = [sys.executable, "-m", "rayward.cli"]
    done = subprocess.run([*command, "run", "label_pars"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "did you mean label_pairs?" in done.stderr
    assert "Traceback" not in done.stderr
    listed = subprocess.run([*command, "ls"], capture_output=True, text=True, timeout=60, check=True).stdout
    assert all(f"  {name} " in listed for name in scripts())
