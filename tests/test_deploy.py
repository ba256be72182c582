"""The examples of deployment: what Docker and Kubernetes take, and what cosched is told in them."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from cosched.engines.sglang.launcher.arguments import command_line
from cosched.engines.sglang.worker.saving import WRITING_S
from cosched.settings.learning import learning_settings
from cosched.settings.load import load_config
from cosched.settings.schema import Config
from cosched.settings.serving import check_for_server
from cosched.sidecar.service import SETTLING_S
from tests.helpers.paths import ROOT
from tests.helpers.serving import sglang_parser

FOLDER = ROOT / "examples" / "deploy"
COMPOSE, KUBERNETES = FOLDER / "compose.yaml", FOLDER / "kubernetes.yaml"
HEALTH_S = 20  # that SGLang's /health looks for a sign of life (SGLANG_HEALTH_CHECK_TIMEOUT)
POD = "cosched-server-7d9c5b8f6b-x2x9q"
ENDING_S = (
    5 + 15
)  # SGLang looks every five seconds whether all are answered, and gives its processes 15
SAVING_S = 2 * WRITING_S + SETTLING_S  # one state that is being written, and the last

LINTERS = {
    COMPOSE: ("check_jsonschema", "--builtin-schema", "vendor.compose-spec"),
    KUBERNETES: ("kubernetes_validate", "--strict"),
}
PACKAGES = {"check_jsonschema": "check-jsonschema", "kubernetes_validate": "kubernetes-validate"}


def lint(example: Path, file: Path) -> subprocess.CompletedProcess[str]:
    """What the tool for that example says of a file; it reads schemas that its package has."""
    module, *words = LINTERS[example]
    if find_spec(module) is None:
        pytest.skip(f"{module} is not installed (pip install {PACKAGES[module]})")
    return subprocess.run(
        [sys.executable, "-m", module, *words, str(file)],
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("example", LINTERS, ids=lambda path: path.stem)
def test_an_example_is_of_the_published_schema(example: Path) -> None:
    done = lint(example, example)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("example", "old", "new"),
    [
        (COMPOSE, "stop_grace_period: 1m", "stop_grace_periode: 1m"),
        (COMPOSE, 'ports: ["30000:30000"]', "ports: 30000"),
        (KUBERNETES, "terminationGracePeriodSeconds: 60 ", "terminationGracePeriod: 60 "),
        (KUBERNETES, "replicas: 2", "replicas: two"),
        (KUBERNETES, "[{port: 29600}]", "29600"),
    ],
)
def test_a_mistake_in_one_is_found(example: Path, old: str, new: str, tmp_path: Path) -> None:
    """Else the test above could not fail: a name that is misspelt, a value of another kind."""
    text = example.read_text(encoding="utf-8")
    assert text.count(old) == 1
    broken = tmp_path / example.name
    broken.write_text(text.replace(old, new), encoding="utf-8")
    done = lint(example, broken)
    assert done.returncode != 0, done.stdout
    assert "Traceback" not in done.stdout + done.stderr


# --- what the two say, in the same form ------------------------------------------------------------


def services() -> dict[str, dict[str, Any]]:
    return yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))["services"]


def objects(kind: str) -> dict[str, dict[str, Any]]:
    """Of one kind, by their names."""
    every = yaml.safe_load_all(KUBERNETES.read_text(encoding="utf-8"))
    return {one["metadata"]["name"]: one for one in every if one["kind"] == kind}


def pod_of(name: str) -> dict[str, Any]:
    return objects("Deployment")[name]["spec"]["template"]["spec"]


def container_of(name: str) -> dict[str, Any]:
    (container,) = pod_of(name)["containers"]
    return container


def seconds(duration: str) -> int:
    """``1m``, ``90s``, as Compose has it."""
    return int(duration[:-1]) * {"s": 1, "m": 60}[duration[-1]]


COMMANDS: dict[str, tuple[Callable[[], list[str]], Callable[[], list[list[str]]]]] = {
    "compose": (
        lambda: services()["trainer"]["command"],
        lambda: [services()[name]["command"] for name in ("server-0", "server-1")],
    ),
    "kubernetes": (
        lambda: container_of("cosched-trainer")["args"],
        lambda: [container_of("cosched-server")["args"]],
    ),
}


def told(command: list[str], verb: str) -> tuple[Config, list[str]]:
    """The settings that a command means, and what of it is for others."""
    assert command[:3] == ["cosched", verb, "-c"]
    path, *rest = command[3:]
    words = [word.replace("$(POD_NAME)", POD) for word in rest if word != "--resume"]
    first = next((i for i, word in enumerate(words) if word.startswith("--")), len(words))
    return load_config(ROOT / path, words[:first]), words[first:]


@pytest.mark.parametrize("example", COMMANDS)
def test_trainer_and_servers_are_told_what_goes_together(example: str) -> None:
    """What they are told is read by the same loader and checks as when they start; they learn alike, and
    the servers go where the trainer is, each with a name of its own."""
    trainer_command, server_commands = (told_of() for told_of in COMMANDS[example])
    trainer, others = told(trainer_command, "train")
    assert others == []
    assert (
        "--resume" in trainer_command
    )  # it is started again by the same words, and is refused without
    commands = [told(command, "serve") for command in server_commands]
    for config, words in commands:
        check_for_server(config)
        assert command_line(config, words, sglang_parser())
        assert "--resume" not in words
        assert learning_settings(config) == learning_settings(trainer)
        own, theirs = trainer.adapt.sidecar, config.adapt.sidecar
        assert own.key_file == theirs.key_file
        assert theirs.address == (own.address or "").replace("*", "cosched-trainer")
    names = {config.run.name for config, _ in commands} | {trainer.run.name}
    assert len(names) == len(commands) + 1


def test_pods_have_names_of_their_own_and_reach_the_trainer_by_its_service() -> None:
    config, words = told(container_of("cosched-server")["args"], "serve")
    variables = {one["name"]: one for one in container_of("cosched-server")["env"]}
    assert config.run.name == POD
    assert variables["POD_NAME"]["valueFrom"]["fieldRef"]["fieldPath"] == "metadata.name"
    assert words[-1] == "$(COSCHED_API_KEY)"
    assert "COSCHED_API_KEY" in variables
    service = objects("Service")["cosched-trainer"]["spec"]
    assert config.adapt.sidecar.address == f"tcp://cosched-trainer:{service['ports'][0]['port']}"


def test_services_and_policies_find_the_pods_that_they_are_for() -> None:
    """A selector that matches nothing is no mistake to Kubernetes: requests wait, or anybody may send rows."""
    pods = {
        name: one["spec"]["template"]["metadata"]["labels"]
        for name, one in objects("Deployment").items()
    }
    for name, one in objects("Deployment").items():
        assert one["spec"]["selector"]["matchLabels"] == pods[name]
    for service in objects("Service").values():
        found = [name for name, own in pods.items() if own == service["spec"]["selector"]]
        ports = {port["name"] for name in found for port in container_of(name)["ports"]}
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports
        assert len(found) == 1
    policy = objects("NetworkPolicy")["cosched-trainer"]["spec"]
    assert policy["podSelector"]["matchLabels"] == pods["cosched-trainer"]
    (ingress,) = policy["ingress"]
    assert ingress["from"] == [{"podSelector": {"matchLabels": pods["cosched-server"]}}]
    assert [p["port"] for p in ingress["ports"]] == [
        p["containerPort"] for p in container_of("cosched-trainer")["ports"]
    ]
    key, value = next(iter(pods["cosched-server"].items()))
    assert f"{key}={value}" in container_of("cosched-router")["args"]
    account = pod_of("cosched-router")["serviceAccountName"]
    (binding,) = objects("RoleBinding").values()
    assert account in objects("ServiceAccount")
    assert [subject["name"] for subject in binding["subjects"]] == [account]
    assert binding["roleRef"]["name"] in objects("Role")


def test_the_router_knows_all_servers_and_gives_one_up_before_it_gives_a_request_up() -> None:
    """It tries five times, and as a rule where it sent a prompt like this one before: with its own limit of ten
    failures all five go to a server that was killed (tests/sglang/test_router.py)."""
    every = services()
    for words in (every["router"]["command"], container_of("cosched-router")["args"]):
        limit = words[words.index("--cb-failure-threshold") + 1]
        assert int(limit) < 5
    words = every["router"]["command"]
    first = words.index("--worker-urls") + 1
    urls = [word for word in words[first : first + 2] if word.startswith("http://")]
    assert urls == [f"http://{name}:30000" for name in ("server-0", "server-1")]
    server = container_of("cosched-server")
    words = container_of("cosched-router")["args"]
    port = words[words.index("--service-discovery-port") + 1]
    assert int(port) == server["ports"][0]["containerPort"]


def test_what_is_mounted_is_there() -> None:
    """Volumes by their names, claims by theirs."""
    compose = yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))
    for one in compose["services"].values():
        sources = [volume.split(":")[0] for volume in one.get("volumes", [])]
        assert {name for name in sources if re.fullmatch(r"\w+", name)} <= set(compose["volumes"])
        if "pid" in one:
            assert one["pid"].removeprefix("service:") in compose["services"]
    claims = objects("PersistentVolumeClaim")
    for name in ("cosched-trainer", "cosched-server"):
        volumes = {one["name"]: one for one in pod_of(name)["volumes"]}
        assert {one["name"] for one in container_of(name)["volumeMounts"]} <= set(volumes)
        of_claims = [one.get("persistentVolumeClaim") for one in volumes.values()]
        assert {one["claimName"] for one in of_claims if one} <= set(claims)


def test_servers_and_the_trainer_share_what_rows_go_through() -> None:
    """The namespace of processes is that of a container which does not end with the trainer, and the
    socket's folder is a volume of all of them."""
    every = services()
    alike = [every[name] for name in ("trainer", "server-0", "server-1")]
    assert [one["pid"] for one in alike] == ["service:processes"] * 3
    assert every["processes"]["command"] == ["sleep", "infinity"]
    address = told(every["trainer"]["command"], "train")[0].adapt.sidecar.address or ""
    folder = str(Path(address.removeprefix("ipc://")).parent)
    assert all(f"socket:{folder}" in one["volumes"] for one in alike)


def test_every_gpu_has_one_process() -> None:
    limited = [one["deploy"]["resources"] for one in services().values() if "deploy" in one]
    devices = [device for one in limited for device in one["reservations"]["devices"]]
    assert sorted(one["device_ids"] for one in devices) == [["0"], ["1"], ["2"]]
    for name in ("cosched-trainer", "cosched-server"):
        assert container_of(name)["resources"]["limits"] == {"nvidia.com/gpu": 1}


def test_who_is_told_to_end_has_the_time_for_it() -> None:
    """Docker kills after ten seconds, Kubernetes after thirty, unless told: the trainer's last state would
    be lost, and answers that are under way."""
    every = services()
    assert seconds(every["trainer"]["stop_grace_period"]) > SAVING_S
    assert pod_of("cosched-trainer")["terminationGracePeriodSeconds"] > SAVING_S
    for name in ("server-0", "server-1"):
        assert seconds(every[name]["stop_grace_period"]) >= 60 + ENDING_S
    wait = container_of("cosched-server")["lifecycle"]["preStop"]["exec"]["command"]
    given = pod_of("cosched-server")["terminationGracePeriodSeconds"]
    assert given >= int(wait[1]) + 60 + ENDING_S


def test_a_probe_waits_as_long_as_sglang_takes_to_answer() -> None:
    """/health sleeps a second before it looks, so that Kubernetes' usual limit of one would fail each time,
    and start a server that is well again and again."""
    container = container_of("cosched-server")
    probes = [container[f"{name}Probe"] for name in ("startup", "readiness", "liveness")]
    assert {probe["httpGet"]["path"] for probe in probes} == {"/health"}
    assert all(probe["timeoutSeconds"] > HEALTH_S for probe in probes)
    startup = container["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 600
    for name in ("server-0", "server-1"):
        check = services()[name]["healthcheck"]
        assert seconds(check["timeout"]) > HEALTH_S
        assert f"timeout={HEALTH_S + 5})" in check["test"][-1]
