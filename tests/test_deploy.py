"""cluster.yaml and deploy/: Ray's validator takes the launcher's files, a strict schema those for Kubernetes, and every door is shut."""

from __future__ import annotations

import ast
import copy
import fnmatch
import importlib.util
import itertools
import json
import re
import shlex
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import typer.main
import yaml

from driving import ROOT
from rayward import cli
from test_architecture import commands, tree, wrong

LAUNCHER = [ROOT / "cluster.yaml", *sorted((ROOT / "deploy").glob("*.yaml"))]
KUBERNETES = sorted((ROOT / "deploy" / "kuberay").glob("*.yaml"))
README, DOCKERFILE = ROOT / "deploy" / "README.md", ROOT / "deploy" / "Dockerfile"
ALL = [*LAUNCHER, *KUBERNETES, README, DOCKERFILE]
GPUS = {"m6i": 0, "g6": 1, "n2": 0, "g2": 1}  # of the instance families that the files name, each instance at its smallest
PINS = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

Config = dict[str, Any]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def config(path: Path) -> Config:
    return yaml.safe_load(text(path))


# ----------------------------------------------------------------------------------------------------- Ray's cluster launcher


def prepared(given: Config) -> Config:
    """What `ray up` makes of a file before it speaks to a cloud; raises what `ray up` would say."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    full = prepare_config(copy.deepcopy(given))
    validate_config(full)
    return full


@pytest.mark.parametrize("path", LAUNCHER, ids=name)
def test_the_launcher_takes_it(path: Path) -> None:
    full = prepared(config(path))
    assert full["cluster_name"] == "rayward"
    assert full["max_workers"] > 0


SPOILT: dict[str, Callable[[Config], Any]] = {
    "a key that is not there": lambda c: c.update(idle_timeout=5),
    "a misspelt list": lambda c: c.update(worker_start_commands=c.pop("worker_start_ray_commands")),
    "a key of a node type that is not there": lambda c: c["available_node_types"]["gpu"].update(image="x"),
    "a node type without resources": lambda c: c["available_node_types"]["cpu"].pop("resources"),
    "a number as text": lambda c: c.update(max_workers="12"),
    "a head of no kind": lambda c: c.update(head_node_type="leader"),
    "more workers than may be": lambda c: c["available_node_types"]["cpu"].update(min_workers=13),
}


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT)
def test_the_launcher_refuses_what_is_wrong(spoil: Callable[[Config], Any]) -> None:
    given = config(ROOT / "cluster.yaml")
    spoil(given)
    with pytest.raises((jsonschema.ValidationError, ValueError)):
        prepared(given)


def open_doors(given: Config) -> list[str]:
    """What in a launcher's file would let strangers in."""
    found = []
    for kind in ("head", "worker"):
        starts = [c for c in given[f"{kind}_start_ray_commands"] if "ray start" in c]
        found += [f"{kind}: {len(starts)} starts"] if len(starts) != 1 else []
        for start in starts:
            found += [] if re.search(r"\bRAY_AUTH_MODE=token ray start\b", start) else [f"{kind}: no token"]
            hosts = re.findall(r"--dashboard-host[= ](\S+)", start)
            found += [] if hosts == (["127.0.0.1"] if kind == "head" else []) else [f"{kind}: dashboard on {hosts}"]
    if "~/.ray/auth_token" not in given["file_mounts"]:
        found.append("the nodes have no token")
    return found


@pytest.mark.parametrize("path", LAUNCHER, ids=name)
def test_nobody_comes_in_without_a_token(path: Path) -> None:
    assert open_doors(config(path)) == []


@pytest.mark.parametrize(
    ("was", "is_", "found"),
    [
        ("RAY_AUTH_MODE=token ray", "ray", ["head: no token", "worker: no token"]),
        ("RAY_AUTH_MODE=token ray", "RAY_AUTH_MODE=disabled ray", ["head: no token", "worker: no token"]),
        ("--dashboard-host=127.0.0.1", "--dashboard-host=0.0.0.0", ["head: dashboard on ['0.0.0.0']"]),
        ("--dashboard-host=127.0.0.1", "", ["head: dashboard on []"]),
        ("~/.ray/auth_token: ~/.ray/auth_token", "~/x: ~/x", ["the nodes have no token"]),
    ],
)
def test_an_open_door_would_be_seen(was: str, is_: str, found: list[str]) -> None:
    assert was in text(ROOT / "cluster.yaml")
    assert open_doors(yaml.safe_load(text(ROOT / "cluster.yaml").replace(was, is_))) == found


def gpus(node: Config) -> int:
    """What a machine of a cloud has."""
    kind = node["node_config"].get("InstanceType") or node["node_config"]["machineType"]
    return GPUS[re.split(r"[.-]", kind)[0]]


@pytest.mark.parametrize("path", [p for p in LAUNCHER if "available_node_types" in config(p)], ids=name)
def test_cpu_work_and_gpu_work_have_machines_of_their_own(path: Path) -> None:
    given = config(path)
    kinds = given["available_node_types"]
    head = kinds.pop(given["head_node_type"])
    assert (head["max_workers"], head["resources"], gpus(head)) == (0, {"CPU": 0, "GPU": 0}, 0)
    assert {kind: bool(gpus(node)) for kind, node in kinds.items()} == {"cpu": False, "gpu": True}
    assert given["max_workers"] == sum(node["max_workers"] for node in kinds.values())
    assert given["docker"]["image"].endswith("-cpu")
    for node in kinds.values():
        assert node["min_workers"] <= node["max_workers"]
        assert node["resources"].get("GPU", gpus(node)) == gpus(node)
        image = node["docker"]["worker_image"] if "docker" in node else given["docker"]["image"]
        assert bool(re.search(r"-cu\d+$", image)) == bool(gpus(node))
        installs = " ".join(node["worker_setup_commands"] if "worker_setup_commands" in node else given["worker_setup_commands"])
        assert ("whl/cpu" in installs) == (not gpus(node))  # torch with CUDA where there is a GPU, and nowhere else


@pytest.mark.parametrize("path", LAUNCHER, ids=name)
def test_jobs_are_told_where_things_are_kept_and_nodes_install_what_make_wheel_made(path: Path) -> None:
    said = text(path)
    assert re.search(r"RAYWARD_STORE=\S", said)
    assert re.search(r"MLFLOW_TRACKING_URI=\S", said)
    given = config(path)
    assert given["file_mounts"]["~/rayward"] == "dist"
    assert re.search(r"^wheel:.*\n(?:\t.*\n)*\tcp constraints.txt dist/", text(ROOT / "Makefile"), re.MULTILINE)
    for command in prepared(given)["head_setup_commands"]:
        assert "pip install" not in command or "--constraint ~/rayward/constraints.txt" in command


# ----------------------------------------------------------------------------------------------------------------- Kubernetes

SCHEMA = json.loads((Path(__file__).parent / "kubernetes_schema.json").read_text(encoding="utf-8"))


def objects(*paths: Path) -> list[Config]:
    return [document for path in paths for document in yaml.safe_load_all(text(path))]


def faults(document: Config) -> list[str]:
    """What in an object its schema does not know, or misses."""
    kind = document["kind"]
    if kind not in SCHEMA["kinds"]:
        return [f"kind {kind}"]
    check = jsonschema.Draft202012Validator({"$ref": f"#/$defs/{kind}", "$defs": SCHEMA["$defs"]})
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in check.iter_errors(document)]


@pytest.mark.parametrize("path", KUBERNETES, ids=name)
def test_kubernetes_knows_every_field(path: Path) -> None:
    found = objects(path)
    assert found
    assert [fault for document in found for fault in faults(document)] == []


def test_the_schema_is_used_as_a_whole() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert {document["kind"] for document in objects(*KUBERNETES)} == set(SCHEMA["kinds"])
    assert set(re.findall(r"#/\$defs/(\w+)", json.dumps(SCHEMA))) | set(SCHEMA["kinds"]) == set(SCHEMA["$defs"])


@pytest.mark.parametrize(
    ("file", "was", "is_"),
    [
        ("raycluster", "authOptions:", "authOption:"),
        ("raycluster", "mode: token", "mode: tokens"),
        ("raycluster", 'num-cpus: "0"', "num-cpus: 0"),
        ("raycluster", "maxReplicas: 8", 'maxReplicas: "8"'),
        ("raycluster", "groupName: cpu", "name: cpu"),
        ("raycluster", "mountPath:", "path:"),
        ("rayjob", "entrypoint:", "entryPoint:"),
        ("rayjob", "rayClusterSpec:", "clusterSpec:"),
        ("mlflow", "matchLabels:", "labels:"),
        ("mlflow", "containerPort: 5000", 'containerPort: "5000"'),
        ("mlflow", "apiVersion: apps/v1", "apiVersion: v1"),
        ("networkpolicy", "policyTypes:", "types:"),
    ],
)
def test_a_wrong_field_would_be_seen(file: str, was: str, is_: str) -> None:
    given = text(ROOT / "deploy" / "kuberay" / f"{file}.yaml")
    assert was in given
    assert [fault for document in yaml.safe_load_all(given.replace(was, is_)) for fault in faults(document)]


def clusters() -> list[Config]:
    specs = {d["kind"]: d["spec"] for d in objects(*KUBERNETES) if d["kind"].startswith("Ray")}
    return [specs["RayCluster"], specs["RayJob"]["rayClusterSpec"]]


def pods(node: Any) -> Iterator[Config]:
    """Every pod's spec, wherever it stands."""
    if isinstance(node, dict):
        if "containers" in node:
            yield node
        for value in node.values():
            yield from pods(value)
    elif isinstance(node, list):
        for value in node:
            yield from pods(value)


@pytest.mark.parametrize("spec", clusters(), ids=["RayCluster", "RayJob"])
def test_ray_on_kubernetes_asks_for_the_token_and_keeps_gpus_apart(spec: Config) -> None:
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["rayVersion"] == PINS["ray"]
    assert spec["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}
    for group in [{"groupName": "head", **spec["headGroupSpec"]}, *spec["workerGroupSpecs"]]:
        pod = group["template"]["spec"]
        [container] = pod["containers"]
        assert container["resources"]["requests"] == container["resources"]["limits"]
        has = "nvidia.com/gpu" in container["resources"]["limits"]
        assert has == (group["groupName"] == "gpu") == bool(re.search(r"-cu\d+$", container["image"])) == ("tolerations" in pod)
        assert {"RAYWARD_STORE", "MLFLOW_TRACKING_URI"} <= {variable["name"] for variable in container["env"]}
        if group["groupName"] != "head":
            assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_a_job_trains_on_as_many_workers_as_it_has_gpus() -> None:
    [job] = [d["spec"] for d in objects(*KUBERNETES) if d["kind"] == "RayJob"]
    [group] = job["rayClusterSpec"]["workerGroupSpecs"]
    words = shlex.split(job["entrypoint"])
    assert words[:2] == ["rayward", "run"]
    assert int(words[words.index("--workers") + 1]) == group["minReplicas"] == group["maxReplicas"] > 1
    assert wrong_words(words[2:]) == []


def test_only_the_namespace_reaches_what_runs_code_and_what_keeps_runs() -> None:
    rules = {d["metadata"]["name"]: d["spec"] for d in objects(*KUBERNETES) if d["kind"] == "NetworkPolicy"}
    assert rules["ray"]["podSelector"] == {"matchLabels": {"ray.io/is-ray-node": "yes"}}
    for deployed in (d for d in objects(*KUBERNETES) if d["kind"] == "Deployment"):
        own = rules[deployed["metadata"]["name"]]
        assert own["podSelector"]["matchLabels"] == deployed["spec"]["template"]["metadata"]["labels"]
    for rule in rules.values():
        assert rule["policyTypes"] == ["Ingress"]
        for way in rule["ingress"]:
            assert way["from"]  # an empty list, or none, is everybody
            for peer in way["from"]:
                assert "ipBlock" not in peer
                assert "namespaceSelector" not in peer or [p["port"] for p in way["ports"]] == [8265]
    assert not [d for d in objects(*KUBERNETES) if d["kind"] == "Service" and "type" in d["spec"]]  # no load balancer, no node port


def test_secrets_are_named_and_the_page_makes_them() -> None:
    asked, said = set(), text(README)
    for pod in pods(objects(*KUBERNETES)):
        for container in pod["containers"]:
            for variable in container.get("env", []):
                secret = re.search(r"PASSWORD|SECRET|TOKEN|KEY", variable["name"])
                assert not (secret and "value" in variable), variable["name"]
                if "valueFrom" in variable:
                    asked.add(tuple(variable["valueFrom"]["secretKeyRef"].values()))
    assert asked == {("mlflow", key) for key in ("postgres-password", "admin-password", "flask-key")}
    assert all(f"--from-literal={key}=" in said for _, key in asked)
    assert set(re.findall(r"--from-literal=([\w-]+)=", said)) == {key for _, key in asked}


def test_the_server_of_runs_asks_who_is_there_and_speaks_to_postgres_through_the_driver_that_is_installed() -> None:
    [server] = [d for d in objects(*KUBERNETES) if d["kind"] == "Deployment" and d["metadata"]["name"] == "mlflow"]
    [container] = server["spec"]["template"]["spec"]["containers"]
    told = {variable["name"]: variable.get("value") for variable in container["env"]}
    assert "--app-name basic-auth" in container["args"][0]
    assert told["MLFLOW_BACKEND_STORE_URI"].startswith("postgresql+psycopg2://")  # SQLAlchemy's own choice is another driver
    assert any(need.startswith("psycopg2") for need in PROJECT["optional-dependencies"]["server"])
    assert told["MLFLOW_ARTIFACTS_DESTINATION"].startswith("s3://")


# ------------------------------------------------------------------------------------------------------------------ the image


def copied() -> list[str]:
    """What the Dockerfile takes from the checkout."""
    lines = re.findall(r"^COPY (?!--from)(.+)$", text(DOCKERFILE), re.MULTILINE)
    return [word for line in lines for word in line.split()[:-1]]


def test_the_image_takes_what_is_there_and_nothing_else_is_sent() -> None:
    ignored = [line for line in text(ROOT / ".dockerignore").splitlines() if line and not line.startswith("#")]
    assert ignored[0] == "*"
    allowed = [line[1:] for line in ignored if line.startswith("!")]
    assert sorted(copied()) == sorted(allowed)
    assert [word for word in copied() if not (ROOT / word).exists()] == []
    assert not [secret for secret in (".git", "store", "dist", ".env") if any(fnmatch.fnmatch(secret, a) for a in allowed)]


def test_the_wheel_is_built_from_what_was_copied() -> None:
    build = tomllib.loads(text(ROOT / "pyproject.toml"))["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = [*build["packages"], *build["force-include"], PROJECT["readme"], *PROJECT["license-files"]]
    assert [path for path in needed if Path(path).parts[0] not in copied()] == []


def test_the_image_is_not_roots_and_asks_for_the_token() -> None:
    said = text(DOCKERFILE)
    assert re.findall(r"^USER (\S+)", said, re.MULTILINE)[-1:] == ["ray"]
    assert re.search(r"^ENV RAY_AUTH_MODE=token", said, re.MULTILINE)
    assert "--constraint /tmp/rayward/constraints.txt" in said


@pytest.mark.parametrize("path", ALL, ids=name)
def test_versions_are_those_that_are_tested(path: Path) -> None:
    said = text(path)
    python = PROJECT["requires-python"].removeprefix(">=").replace(".", "")
    assert set(re.findall(r"rayproject/ray:([\w.]+)-(py\d+)-", said)) <= {(PINS["ray"], f"py{python}")}
    assert set(re.findall(r"^ARG RAY=(\S+)", said, re.MULTILINE)) <= {PINS["ray"]}
    assert set(re.findall(r"/rayward:([\d.]+)-(?:cpu|cu\d+)\b", said)) <= {PROJECT["version"]}
    assert {device for device in re.findall(r"-(cu\d+)\b", said) if device != "cu129"} <= {"cu128"}
    extras = {extra for group in re.findall(r"(?:whl\)|rayward)\[([a-z0-9,]+)\]", said) for extra in group.split(",")}
    assert extras <= set(PROJECT["optional-dependencies"])


# ------------------------------------------------------------------------------------------------------------ words and secrets

PRIVATE = re.compile(
    r"/(?:home|Users|root|work)/(?!ray\b)[\w.]|AKIA[0-9A-Z]{12}|-----BEGIN|\b[0-9a-f]{32,}\b|(?:password|token|secret)[\"']?\s*[:=]\s*[\"']?[A-Za-z0-9]{16}",
    re.IGNORECASE,
)


@pytest.mark.parametrize(
    "leak",
    [
        *("/".join(["", home, "jane", "rayward"]) for home in ("home", "Users", "root", "work")),
        "AKIAIOSFODNN7EXAMPLE",
        "password: correcthorsebattery",
        "a" * 8 + "0123456789abcdef" * 2,
    ],
)
def test_a_leak_would_be_seen(leak: str) -> None:
    assert PRIVATE.search(f"x: {leak}\n")


@pytest.mark.parametrize("path", ALL, ids=name)
def test_no_secret_and_no_path_of_somebodys_machine(path: Path) -> None:
    assert [found.group() for found in PRIVATE.finditer(text(path))] == []


def source(package: str, *files: str) -> str:
    """The text of a package's files, without importing it."""
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return "".join(text(path) for file in files for path in sorted(Path(spec.origin).parent.glob(file)))


def test_every_variable_exists() -> None:
    named = {v for path in ALL for v in re.findall(r"\b(?:RAY|RAYWARD|MLFLOW)_[A-Z_]+\b", text(path))}
    known = "".join(text(path) for path in (ROOT / "platform" / "rayward").rglob("*.py"))
    known += source("ray", "_private/authentication/*.py", "_private/ray_constants.py", "autoscaler/_private/*.py", "_common/usage/*.py")
    known += source("mlflow", "environment_variables.py", "cli/__init__.py")
    assert {"RAYWARD_STORE", "RAY_AUTH_MODE", "MLFLOW_TRACKING_URI"} <= named
    assert [variable for variable in sorted(named) if not re.search(rf"\b{variable}\b", known)] == []


def anchors(page: str) -> set[str]:
    """How headings of a page are linked to."""
    return {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in re.findall(r"^#+ (.+)$", page, re.MULTILINE)}


def test_links_of_the_page_lead_somewhere() -> None:
    page = text(README)
    links = re.findall(r"\]\(([^)]+)\)", page)
    assert links
    assert [link for link in links if not (link[1:] in anchors(page) if link.startswith("#") else (README.parent / link).exists())] == []
    assert set(re.findall(r"\bdeploy/[\w./-]+\.(?:yaml|md)|\bdeploy/Dockerfile", page)) <= {name(path) for path in ALL}
    assert set(re.findall(r"\bmake ([a-z-]+)", page)) <= set(re.findall(r"^([a-z-]+):", text(ROOT / "Makefile"), re.MULTILINE))


def wrong_words(words: list[str]) -> list[str]:
    """What in `NAME its options` does not exist, as far as the script's own settings say; nothing is imported for it."""
    script = cli.scripts().get(words[0]) if words else None
    if script is None:
        return [] if words and re.fullmatch(r"NAME|[.]+", words[0]) else words[:1]
    [settings] = [node for node in tree(script).body if isinstance(node, ast.ClassDef) and node.name == "Settings"]
    fields = {field.target.id for field in settings.body if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)}
    given = [word.removeprefix("--").replace("-", "_") for word in words if word.startswith("--")]
    given += [value.partition(".")[0] for flag, value in itertools.pairwise(words) if flag == "--set"]
    return [setting for setting in given if setting not in fields | {"set", "config", "dry_run", "help"}]


def wrong_submit(words: list[str]) -> list[str]:
    """What in the words of `rayward submit` does not exist: our options, then a script and its own."""
    command: Any = typer.main.get_command(cli.app)
    known = {
        option: parameter for parameter in command.commands["submit"].params for option in (*parameter.opts, *parameter.secondary_opts)
    }
    at = 0
    while at < len(words) and words[at].startswith("--"):
        if words[at] not in known:
            return [words[at]]
        at += 1 if known[words[at]].is_flag else 2
    return wrong_words(words[at:])


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("--adress X label_pairs", ["--adress"]),
        ("--no-wait label_pair", ["label_pair"]),
        ("--gpus 1 label_pairs --sorce S", ["sorce"]),
        ("train_reward_model --set trian.lr=1", ["trian"]),
    ],
)
def test_a_wrong_submission_would_be_seen(words: str, found: list[str]) -> None:
    assert wrong_submit(words.split()) == found


@pytest.mark.parametrize("path", ALL, ids=name)
def test_rayward_commands_exist(path: Path) -> None:
    checks = {"submit": wrong_submit, "run": wrong_words}
    for first, *rest in commands(re.sub(r"^# ?", "", text(path), flags=re.MULTILINE)):
        assert (checks[first](rest) if first in checks else wrong([first, *rest], {})) == [], (first, rest)


def wrong_ray(line: str) -> list[str]:
    """What in a `ray ...` command its source does not name."""
    known, words = source("ray", "scripts/scripts.py"), line.split()
    bad = [] if re.search(rf'^def {words[0]}\(|name="{words[0]}"', known, re.MULTILINE) else words[:1]
    return bad + [word for word in words[1:] if word.startswith("--") and f'"{word.partition("=")[0]}"' not in known]


@pytest.mark.parametrize(
    ("line", "found"),
    [("upp cluster.yaml", ["upp"]), ("start --head --dashbord-host=127.0.0.1", ["--dashbord-host=127.0.0.1"]), ("start --head", [])],
)
def test_a_wrong_command_of_ray_would_be_seen(line: str, found: list[str]) -> None:
    assert wrong_ray(line) == found


@pytest.mark.parametrize("path", [*LAUNCHER, README], ids=name)
def test_commands_of_ray_exist(path: Path) -> None:
    found = re.findall(r"(?:^|[`;&#=]\s*|token )ray ([a-z-]+[^\n`#&>;'\"]*)", re.sub(r"\n +--", " --", text(path)), re.MULTILINE)
    assert len(found) > 2
    assert [bad for line in found for bad in wrong_ray(line)] == []
