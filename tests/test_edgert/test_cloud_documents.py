"""What docs/cloud says fits the program: ports, flags, names, metadata."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import pytest
import yaml

from edgert.cli.host_options import WorkerOptions
from edgert.hosts.address import parse_address
from edgert.hosts.certificates import SERVER_NAME
from edgert.hosts.service.messages import CLIENT_CERTIFICATE_KEY, ROUTE_KEY, SERVICE

CLOUD = Path(__file__).parents[2] / "docs" / "cloud"
PORT = parse_address(WorkerOptions.__dataclass_fields__["listen"].default).port


@pytest.fixture(scope="module")
def objects() -> dict[tuple[str, str], dict[str, Any]]:
    found = yaml.safe_load_all((CLOUD / "kubernetes.yaml").read_text())
    return {(item["kind"], item["metadata"]["name"]): item for item in found}


@pytest.fixture(scope="module")
def nginx() -> str:
    return (CLOUD / "nginx.conf").read_text()


def flags() -> set[str]:
    """Return the flags of `edgert worker`."""
    hints = get_type_hints(WorkerOptions, include_extras=True)
    annotated = [hints[field.name] for field in fields(WorkerOptions)]
    return {
        spelling
        for hint in annotated
        if get_origin(hint) is Annotated
        for spelling in get_args(hint)[1].spellings
    }


def pod_of(objects: dict[tuple[str, str], dict[str, Any]], kind: str, name: str) -> dict[str, Any]:
    spec: dict[str, Any] = objects[kind, name]["spec"]
    assert spec["selector"]["matchLabels"] == spec["template"]["metadata"]["labels"]
    return dict(spec["template"]["spec"])


def test_the_worker_is_started_with_flags_it_has(
    objects: dict[tuple[str, str], dict[str, Any]],
) -> None:
    (worker,) = pod_of(objects, "StatefulSet", "replica")["containers"]
    command, *arguments = worker["args"]
    assert command == "worker"
    assert {item for item in arguments if item.startswith("--")} <= flags()
    values = dict(zip(arguments[::2], arguments[1::2], strict=True))
    assert parse_address(values["--listen"]).port == PORT
    assert (
        int(values["--grace"])
        < pod_of(objects, "StatefulSet", "replica")["terminationGracePeriodSeconds"]
    )
    probe = worker["readinessProbe"]["exec"]["command"]
    assert parse_address(probe[-1].partition("=")[2]).port == PORT


@pytest.mark.parametrize(
    ("service", "kind", "name"),
    [("edgert-replicas", "StatefulSet", "replica"), ("edgert", "Deployment", "edgert-nginx")],
)
def test_services_lead_to_ports_and_pods_that_are_there(
    objects: dict[tuple[str, str], dict[str, Any]], service: str, kind: str, name: str
) -> None:
    spec = objects["Service", service]["spec"]
    pod = pod_of(objects, kind, name)
    assert spec["selector"] == objects[kind, name]["spec"]["template"]["metadata"]["labels"]
    ports = {
        port["name"]: port["containerPort"] for box in pod["containers"] for port in box["ports"]
    }
    for port in spec["ports"]:
        assert ports[port["targetPort"]] == port["port"]


def test_every_volume_that_is_mounted_is_there(
    objects: dict[tuple[str, str], dict[str, Any]],
) -> None:
    for kind, name in (("StatefulSet", "replica"), ("Deployment", "edgert-nginx")):
        pod = pod_of(objects, kind, name)
        boxes = pod["containers"] + pod.get("initContainers", [])
        mounted = {mount["name"] for box in boxes for mount in box["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}
        assert all("limits" in box["resources"] for box in pod["containers"])
    replicas = objects["StatefulSet", "replica"]["spec"]
    assert objects["Service", replicas["serviceName"]]["spec"]["clusterIP"] == "None"


def test_secrets_of_the_manifest_are_made_by_the_documented_commands() -> None:
    text = (CLOUD.parent / "cloud.md").read_text()
    made = set(re.findall(r"kubectl create (?:secret generic|configmap) (\S+)", text))
    manifest = (CLOUD / "kubernetes.yaml").read_text()
    assert made == set(re.findall(r"(?:secretName|configMap: \{name): ([\w-]+)", manifest))


def test_nginx_hashes_and_passes_on_what_the_program_means(nginx: str) -> None:
    assert f"hash $http_{ROUTE_KEY.replace('-', '_')} consistent;" in nginx
    assert f"grpc_set_header {CLIENT_CERTIFICATE_KEY} $ssl_client_escaped_cert;" in nginx
    assert re.search(rf"grpc_ssl_name +{SERVER_NAME};", nginx)
    assert re.findall(r"server replica-\d:(\d+)", nginx) == [str(PORT)] * 2
    assert re.search(r"ssl_verify_client +on;", nginx)
    assert re.search(r"grpc_ssl_verify +on;", nginx)


def test_nginx_listens_where_the_service_leads(
    nginx: str, objects: dict[tuple[str, str], dict[str, Any]]
) -> None:
    (port,) = objects["Service", "edgert"]["spec"]["ports"]
    assert f"listen {port['port']} ssl http2;" in nginx


def test_flags_and_names_in_the_text_are_those_of_the_program() -> None:
    text = (CLOUD.parent / "cloud.md").read_text()
    spoken = set(re.findall(r"`(--[\w-]+)", text))
    assert spoken <= flags()
    assert SERVICE in text
    assert ROUTE_KEY in text
