"""A manifest of home alone beside one of several hosts: the right one, or none."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from builders_manifest import Document, document, edge_cloud, edited, manifest, two_hosts
from edgert.deployment import Deployment, check_abilities
from edgert.errors import FormatError, LinkError, PlanError
from edgert.events import Listener, ignore
from edgert.fallback_manifest import read_fallback, with_fallback
from edgert.hosts.fallback import FallbackBackend
from edgert.llama.options import LoadOptions
from fakes import FakeBackend
from partition.manifest import Manifest
from partition.manifest_file import parse_manifest, violations, write_manifest

NAME = "home.json"


def written(folder: Path, fallback: Document | None = None) -> tuple[Manifest, Path]:
    alone = manifest(fallback or document())
    write_manifest(alone, folder / NAME, replace=False)
    return with_fallback(manifest(two_hosts()), alone, NAME), folder / "hosts.json"


def test_the_fallback_is_read_from_beside_the_manifest(tmp_path: Path) -> None:
    made, path = written(tmp_path)
    assert violations(made) == ()
    write_manifest(made, path, replace=False)
    again = parse_manifest(path.read_bytes(), str(path))
    found = read_fallback(again, path)
    assert found == (manifest(document()), tmp_path / NAME)
    assert read_fallback(manifest(two_hosts()), path) is None


def test_a_fallback_that_was_changed_is_refused(tmp_path: Path) -> None:
    made, path = written(tmp_path)
    (tmp_path / NAME).unlink()
    write_manifest(
        manifest(edited(document(), "binds", "something else")), tmp_path / NAME, replace=False
    )
    with pytest.raises(FormatError, match="SHA-256 is"):
        read_fallback(made, path)


@pytest.mark.parametrize(
    ("at", "value", "reason"),
    [
        ("model.files.0.sha256", "f" * 64, "another model"),
        ("run.n_ctx", 2048, "holds 2048 positions, wanted 4096"),
        ("run.n_batch", 256, "batches of 256, wanted 512"),
    ],
)
def test_a_fallback_that_could_not_go_on_is_refused(
    at: str, value: object, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(FormatError, match=reason):
        written(tmp_path, edited(document(), at, value))


def test_a_fallback_of_several_hosts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="wanted home alone"):
        written(tmp_path, two_hosts())


@pytest.mark.parametrize("path", ["../other.json", "/etc/x.json", "a//b"])
def test_a_fallback_elsewhere_breaks_a_rule(path: str) -> None:
    policies = {"home": "home", "may_leave": ["hidden_states"]}
    made = two_hosts() | {"policies": policies | {"fallback": {"path": path, "sha256": "a" * 64}}}
    assert "$.policies.fallback.path" in {broken.path for broken in violations(manifest(made))}


def test_a_fallback_of_one_host_breaks_a_rule() -> None:
    policies = {"home": "home", "fallback": {"path": NAME, "sha256": "a" * 64}}
    found = violations(manifest(document() | {"policies": policies}))
    assert "$.policies.fallback" in {broken.path for broken in found}


@dataclass
class FakeDeployment:
    """Opens a fake."""

    backend: FakeBackend

    def open(self, listener: Listener) -> FakeBackend:
        del listener
        return self.backend


def test_a_deployment_with_a_fallback_opens_it_only_when_it_is_needed(tmp_path: Path) -> None:
    def leave(n_pass: int) -> None:
        if n_pass > 1:
            raise LinkError("cloud: gone")

    hosts, home = FakeBackend(before_pass=leave), FakeBackend()
    hosts.give_up = lambda: None  # type: ignore[attr-defined]
    made, _ = written(tmp_path)
    options = LoadOptions(tmp_path / "model.gguf")
    fallback = FakeDeployment(home)
    found = Deployment(
        made,
        options.model,
        options,
        FakeDeployment(hosts),
        fallback,  # type: ignore[arg-type]
    )
    backend = found.open(ignore)
    assert isinstance(backend, FallbackBackend)
    backend.decode([1, 2], 0, 1)
    assert home.passes == []
    backend.decode([3], 2, 1)
    assert home.tokens == [1, 2, 3]


def test_a_cut_between_edge_and_cloud_is_executed() -> None:
    made = edited(edge_cloud(), "variants", [])
    check_abilities(manifest(edited(made, "stages.1.variant", None)))
    unknown = edited(made, "requires", ["resident", "pipeline", "edge_cloud", "accelerator"])
    with pytest.raises(PlanError, match="it needs accelerator"):
        check_abilities(manifest(edited(unknown, "stages.1.variant", None)))
