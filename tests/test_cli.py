"""The command line: run, ls, cp, models; and the mistakes users make, each of which is one message with a way out and exit code 2."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from driving import Said, Toy, done, here, rayward
from driving import toy as make_toy
from rayward import cli
from rayward.storage import open_dataset


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return make_toy(tmp_path_factory.getbasetemp())


@pytest.fixture
def filled(toy: Toy, store: Path) -> Path:
    """A store of the test's own that holds toy-pairs and toy-steps."""
    shutil.copytree(toy.store, store)
    return store


@pytest.fixture(autouse=True)
def at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: Path) -> Path:
    """Every command runs in an empty folder of its own."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.chdir(home)
    return home


# ------------------------------------------------------------------------------------------------------------------ scripts


def test_ls_names_every_script_with_its_first_line(at_home: Path) -> None:
    said = done(rayward("ls", cwd=at_home))
    assert said.err == ""
    for name, path in cli.scripts().items():
        assert f"  {name:<20} {cli.first_line(path)}" in said.out
    assert said.out.index("pipelines:") < said.out.index("label_pairs") < said.out.index("jobs:") < said.out.index("quickstart")


def test_run_passes_words_output_and_exit_code(at_home: Path) -> None:
    (at_home / "mine.py").write_text("import sys; print(sys.argv[1:]); print('aside', file=sys.stderr); sys.exit(7)")
    assert rayward("run", "mine.py", "--x", "a b", "--help", "-h", cwd=at_home) == Said(7, "['--x', 'a b', '--help', '-h']\n", "aside\n")


def test_the_store_of_a_command_is_an_option_before_it(at_home: Path) -> None:
    (at_home / "mine.py").write_text("import os; print(os.environ['RAYWARD_STORE'])")
    assert done(rayward("--store", "s3://bucket/me", "run", "mine.py", cwd=at_home)).out == "s3://bucket/me\n"
    assert "other/mlflow.db" in done(rayward("--store", "other", "models", "list", cwd=at_home)).out
    rayward("--store", "store:x", "ls", cwd=at_home).mistake("names itself")


def test_run_by_name_does_the_work(toy: Toy, at_home: Path) -> None:
    said = done(rayward("run", "label_rankings", "--source", str(toy.answers), "--output", "rankings", cwd=at_home))
    made = open_dataset(at_home / "rankings", "examples")
    assert made.manifest.summary() in said.err
    assert 0 < made.manifest.out == made.table().num_rows


def test_a_copied_script_is_the_users_own(toy: Toy, at_home: Path) -> None:
    assert "mine.py" in done(rayward("cp", "label_pairs", "mine.py", cwd=at_home)).out
    copy = at_home / "mine.py"
    copy.write_text(copy.read_text().replace("= PairSettings()", '= PairSettings("adjacent")'))
    done(rayward("run", "mine.py", "--source", str(toy.answers), "--output", "mine", cwd=at_home))
    assert open_dataset(at_home / "mine").manifest.digest == open_dataset(toy.pairs).manifest.digest


def test_cp_into_a_folder_keeps_the_name_and_replaces_nothing(at_home: Path) -> None:
    done(here("rayward", "cp", "label_pairs", at_home))
    mine = at_home / "label_pairs.py"
    mine.write_text("changed")
    here("rayward", "cp", "label_pairs", at_home).mistake("is there already", "->")
    here("rayward", "cp", "label_pairs", at_home / "no" / "such.py").mistake("there is no folder", "->")
    assert mine.read_text() == "changed"


def test_an_unknown_script_is_answered_with_the_one_meant(at_home: Path) -> None:
    rayward("run", "lable_pairs", "--source", "S", cwd=at_home).mistake("no script lable_pairs", "-> did you mean label_pairs?")
    here("rayward", "cp", "lable_pairs").mistake("did you mean label_pairs?")
    here("rayward", "run", "nowhere.py").mistake("no script nowhere.py", "->")
    here("rayward", "models", "shwo").mistake("Did you mean 'show'?")


def test_dry_run_prints_settings_that_can_be_given_back(toy: Toy, at_home: Path) -> None:
    words = ("--source", str(toy.answers), "--output", "o", "--set", "label.choose=best_worst", "--set", "label.min_gap=0.5")
    (at_home / "mine.yaml").write_text(done(here("label_pairs", *words, "--dry-run")).out)
    assert not (at_home / "o").exists()
    assert done(here("label_pairs", "--config", "mine.yaml", "--dry-run")).out == (at_home / "mine.yaml").read_text()
    said = done(here("label_pairs", "--config", "mine.yaml", "--set", "label.choose=all", "--output", "p", "--dry-run")).out
    assert "choose: all" in said
    assert "min_gap: 0.5" in said
    assert "output: p" in said


# ------------------------------------------------------------------------------------------------------------------- models


def test_an_empty_store_says_how_to_fill_it(at_home: Path) -> None:
    said = rayward("models", "list", "--json", cwd=at_home)
    assert said == Said(0, "[]\n", "")  # for scripts: nothing beside it, even while the store is made
    assert "rayward quickstart" in done(here("rayward", "models", "list")).out
    here("rayward", "models", "show", "toy-pairs").mistake("no model toy-pairs", "->", "--register NAME")
    here("rayward", "models", "promote", "toy-pairs", "1").mistake("no model toy-pairs", "->")


def test_models_list_shows_whole_names_where_there_is_no_terminal(filled: Path, at_home: Path) -> None:
    said = done(rayward("models", "list", cwd=at_home)).out
    for word in ("model", "version", "alias", "toy-pairs", "toy-steps", "champion", "bradley_terry", "binary_cross_entropy"):
        assert word in said.split(), said


def test_models_list_as_json(filled: Path, toy: Toy) -> None:
    pairs, steps = json.loads(done(here("rayward", "models", "list", "--json")).out)
    assert (pairs["name"], pairs["version"], pairs["aliases"]) == ("toy-pairs", "1", ["champion"])
    assert (steps["name"], steps["version"], steps["aliases"]) == ("toy-steps", "1", [])
    assert pairs["tags"]["data_digest"] == open_dataset(toy.pairs).manifest.digest


def test_models_show_says_where_it_came_from_and_how_to_load_it(filled: Path, toy: Toy) -> None:
    said = done(here("rayward", "models", "show", "toy-pairs@champion")).out
    for word in ("version 1", "@champion", open_dataset(toy.pairs).manifest.digest, "adjacent", "bradley_terry", "models:/toy-pairs/1"):
        assert word in said
    row = json.loads(done(here("rayward", "models", "show", "models:/toy-pairs/1", "--json")).out)
    assert row["params"]["train.lr"] == "0.002"
    assert "adjacent" in row["tags"].values()


def test_promote_moves_an_alias(filled: Path) -> None:
    assert done(here("rayward", "models", "promote", "toy-steps", "1")).out == "models:/toy-steps@champion is now version 1\n"
    done(here("rayward", "models", "promote", "toy-steps", "1", "--alias", "canary"))
    [_, steps] = json.loads(done(here("rayward", "models", "list", "--json")).out)
    assert steps["aliases"] == ["canary", "champion"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("show toy-pair", "did you mean toy-pairs?"),
        ("show toy-pairs@nobody", "no alias nobody"),
        ("show toy-pairs/7", "it has 1"),
        ("promote toy-pairs 7", "it has 1"),
        ("promote toy-pair 1", "did you mean toy-pairs?"),
        ("promote toy-pairs 1 --alias v1", "v1"),  # MLflow keeps v1, v2, ... for itself
        ("promote toy-pairs 1 --alias a:b", "a:b"),
    ],
)
def test_mistakes_with_models(filled: Path, words: str, said: str) -> None:
    here("rayward", "models", *words.split()).mistake(said, "->")


# ----------------------------------------------------------------------------------------------------------- users' mistakes


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("", ["missing: source, output", "--source ... --output ..."]),
        ("--source ANSWERS", ["missing: output", "--output ..."]),
        ("--source nowhere --output o", ["nowhere does not exist"]),
        ("--source PAIRS --output o", ["holds examples (made by label_pairs), not rollouts"]),
        ("--source . --output o", ["no manifest.json", "rayward run import_rollouts"]),
        ("--source ANSWERS --output o --set label.chose=all", ["label.chose is not a setting", "did you mean choose?"]),
        ("--source ANSWERS --output o --set lable.choose=all", ["lable is not a setting", "did you mean label?"]),
        ("--source ANSWERS --output o --set label.choose", ["no name=value in it"]),
        ("--source ANSWERS --output o --set label=all", ["label='all' is a group", "label.NAME=VALUE"]),
        ("--source ANSWERS --output o --set label.choose=bestworst", ["'bestworst'", "did you mean best_worst?"]),
        ("--source ANSWERS --output o --engine loca", ["'loca'", "did you mean local?"]),
        ("--source ANSWERS --output o --config broken.yaml", ["broken.yaml is not YAML", "line 1"]),
        ("--source ANSWERS --output o --config list.yaml", ["list.yaml holds a list", "name: value"]),
        ("--source ANSWERS --output o --config nowhere.yaml", ["nowhere.yaml"]),
        ("--source ANSWERS --output o --config wrong.yaml", ["sorce is not a setting", "did you mean source?"]),
    ],
)
def test_mistakes_with_settings(toy: Toy, at_home: Path, words: str, said: list[str]) -> None:
    (at_home / "broken.yaml").write_text("label: [1\n")
    (at_home / "list.yaml").write_text("- 1\n")
    (at_home / "wrong.yaml").write_text("sorce: x\n")
    given = [{"ANSWERS": str(toy.answers), "PAIRS": str(toy.pairs)}.get(word, word) for word in words.split()]
    here("label_pairs", *given).mistake("->", *said)
    assert not (at_home / "o").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--set label.min_gap=much", "label.min_gap='much' is not a number"),
        ("--set label.min_gap=-1", "min_gap=-1.0 must be at least 0"),
        ("--sorce S", "--source"),
    ],
)
def test_a_wrong_value_is_said_with_its_setting(toy: Toy, words: str, said: str) -> None:
    here("label_pairs", "--source", toy.answers, "--output", "o", *words.split()).mistake(said)


def test_a_mistake_is_one_message_in_a_process_of_its_own_too(toy: Toy, at_home: Path) -> None:
    said = rayward("run", "label_pairs", "--source", str(toy.pairs), "--output", "o", cwd=at_home)
    assert said.mistake("not rollouts").startswith("error: ")
    assert said.out == ""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("sample_rollouts --problems toy:many", "toy:400"),
        ("sample_rollouts --problems toy:0", "toy:0"),
        ("sample_rollouts --problems toy:4 --parts -1", "parts"),
        ("sample_rollouts --problems toy:4 --set sample.policy=toyy", "did you mean toy?"),
        ("sample_rollouts --problems toy:4 --set sample.grader=numerc", "did you mean numeric?"),
        ("import_rollouts --source nowhere.jsonl", "nowhere.jsonl does not exist"),
        ("import_rollouts --source rows.txt", ".jsonl"),
        ("import_rollouts --source rows.jsonl --format prefrence", "did you mean preference?"),
        ("split_examples --source PAIRS --set shares.test=2", "test=2.0"),
        ("train_reward_model --examples ANSWERS", "rayward run label_pairs"),
        ("train_reward_model --examples PAIRS --objective bradly_terry", "did you mean bradley_terry?"),
        ("train_reward_model --examples PAIRS --objective nowhere:loss", "PYTHONPATH"),
        ("train_reward_model --examples PAIRS --model nowhere", "give a folder"),
        ("train_reward_model --examples PAIRS --model models:/nobody", "no model nobody"),
        ("train_reward_model --examples PAIRS --workers 0", "workers"),
        ("train_reward_model --examples PAIRS --validation-share 1", "validation"),
        ("train_reward_model --examples PAIRS --register a/b", "a/b"),
        ("evaluate_model --model MODEL", "--suite"),
        ("evaluate_model --model MODEL --suite toy_pairs --examples PAIRS", "either --examples or --suite"),
        ("evaluate_model --model MODEL --suite toy_pair", "did you mean toy_pairs?"),
        ("evaluate_model --model nowhere --examples PAIRS", "nowhere"),
        ("evaluate_model --model ANSWERS --examples PAIRS", "cannot be loaded"),
        ("evaluate_model --model MODEL --examples ANSWERS", "rayward run label_pairs"),
        ("score_rollouts --model nowhere --source ANSWERS", "nowhere holds no model"),
        ("score_rollouts --model models:/toy-pairs@nobody --source ANSWERS", "toy-pairs"),
        ("score_rollouts --model MODEL --source ANSWERS --actors 0", "actors"),
        ("score_rollouts --model MODEL --source PAIRS", "not rollouts"),
    ],
)
def test_mistakes_with_data_and_models(toy: Toy, at_home: Path, words: str, said: str) -> None:
    (at_home / "rows.txt").write_text("rows")
    (at_home / "rows.jsonl").write_text('{"prompt": "2+2?", "chosen": "4", "rejected": "5"}\n')
    given = {"ANSWERS": toy.answers, "PAIRS": toy.pairs, "MODEL": toy.pairs_model}
    script, *rest = words.split()
    here(script, *(str(given.get(word, word)) for word in rest), "--output", "o").mistake(said)
    assert not (at_home / "o" / "model").exists()  # the mistake was seen before the work was done


def test_a_store_that_cannot_be_used_is_named(at_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (at_home / "file").write_text("not a folder")
    monkeypatch.setenv("RAYWARD_STORE", str(at_home / "file"))
    here("rayward", "models", "list").mistake("file", "->")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nowhere://here")
    here("rayward", "models", "list").mistake("nowhere://here", "->")


# ---------------------------------------------------------------------------------------------------------- what is in the way


@pytest.mark.parametrize("taken", ["folder", "folder/letter.txt"])
@pytest.mark.parametrize(
    "words",
    [
        "label_pairs --source ANSWERS",
        "sample_rollouts --problems toy:4",
        "split_examples --source PAIRS",
        "train_reward_model --examples PAIRS",
        "score_rollouts --source ANSWERS --model MODEL",
        "evaluate_model --examples PAIRS --model MODEL",
    ],
)
def test_an_output_that_holds_something_else_is_kept(toy: Toy, at_home: Path, words: str, taken: str) -> None:
    letter = at_home / "folder" / "letter.txt"
    letter.parent.mkdir()
    letter.write_text("dear")
    given = {"ANSWERS": toy.answers, "PAIRS": toy.pairs, "MODEL": toy.pairs_model}
    script, *rest = words.split()
    here(script, *(str(given.get(word, word)) for word in rest), "--output", taken).mistake(taken, "->")
    assert [str(path.relative_to(at_home)) for path in at_home.rglob("*")] == ["folder", "folder/letter.txt"]
    assert letter.read_text() == "dear"


@pytest.mark.parametrize("output", [".", "", "letter.txt/below"])
def test_an_output_that_cannot_be_is_said(toy: Toy, at_home: Path, output: str) -> None:
    if output.startswith("letter.txt"):
        (at_home / "letter.txt").write_text("dear")
    here("label_pairs", "--source", toy.answers, "--output", output).mistake("->")
    here("evaluate_model", "--examples", toy.pairs, "--model", toy.pairs_model, "--output", output).mistake("->")
    assert [p.name for p in at_home.iterdir()] == ["letter.txt"] * output.startswith("letter.txt")


def test_the_same_command_twice_is_fine_and_another_needs_overwrite(toy: Toy, at_home: Path) -> None:
    words = ("--source", toy.answers, "--output", "o")
    done(here("label_pairs", *words))
    before = open_dataset("o").parts[0].stat()
    done(here("label_pairs", *words))
    assert open_dataset("o").parts[0].stat().st_mtime_ns == before.st_mtime_ns
    here("label_pairs", *words, "--set", "label.choose=adjacent").mistake("already holds something else", "--overwrite")
    done(here("label_pairs", *words, "--set", "label.choose=adjacent", "--overwrite"))
    assert open_dataset("o").manifest.digest == open_dataset(toy.pairs).manifest.digest


def test_a_report_is_replaced_by_the_next_one(toy: Toy, at_home: Path) -> None:
    for examples, model in ((toy.pairs, toy.pairs_model), (toy.steps, toy.steps_model)):
        done(here("evaluate_model", "--examples", examples, "--model", model, "--output", "report"))
        assert json.loads((at_home / "report" / "report.json").read_text())["name"] == str(examples)


def test_the_way_out_of_a_failed_training_can_be_taken(toy: Toy, at_home: Path) -> None:
    job = ("--examples", toy.pairs, "--output", "o", "--set", "net.width=16", "--set", "net.layers=1", "--set", "batch.size=64")
    here("train_reward_model", *job, "--set", "render.max_length=4").mistake("too long", "--set render.max_length=")
    assert "model: " in done(here("train_reward_model", *job, "--set", "render.max_length=160")).out


def test_json_settings_are_given_as_the_help_shows_them(at_home: Path) -> None:
    words = ("--problems", "toy:8", "--set", "sample.answers=2", "--output", "o")
    done(here("sample_rollouts", *words, "--set", 'sample.policy_settings={"slip": 0.0}'))
    assert pq.read_table(open_dataset("o").parts[0])["correct"].to_pylist() == [True] * 16
