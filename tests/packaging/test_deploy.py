"""The Kubernetes example is one that works: its configuration is accepted, its parts agree, and its walls stand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from sidecar.config import Configuration, load_configuration, load_policy

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def documents() -> dict[str, Any]:
    """The example's objects by kind."""
    loaded = yaml.safe_load_all((ROOT / "deploy/kubernetes.yaml").read_text())
    return {document["kind"]: document for document in loaded}


@pytest.fixture
def configuration(documents: dict[str, Any], tmp_path: Path) -> Configuration:
    """The example's configuration, as the sidecar reads it."""
    (tmp_path / "custody.yaml").write_text(documents["ConfigMap"]["data"]["custody.yaml"])
    return load_configuration(tmp_path / "custody.yaml")


@pytest.fixture
def pod(documents: dict[str, Any]) -> dict[str, Any]:
    """The pod that the example makes."""
    spec: dict[str, Any] = documents["StatefulSet"]["spec"]["template"]["spec"]
    return spec


@pytest.fixture
def sidecar(pod: dict[str, Any]) -> dict[str, Any]:
    """The sidecar's container."""
    (container,) = [container for container in pod["initContainers"] if container["name"] == "custody"]
    return dict(container)


@pytest.fixture
def application(pod: dict[str, Any]) -> dict[str, Any]:
    """The application's container."""
    (container,) = pod["containers"]
    return dict(container)


def _mounts(container: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {mount["mountPath"]: mount for mount in container["volumeMounts"]}


def _directory(listener: str) -> str:
    return str(Path(listener.removeprefix("unix:")).parent)


def test_the_policy_names_the_workloads_that_the_sockets_name(
    documents: dict[str, Any], configuration: Configuration, tmp_path: Path
) -> None:
    """Configuration and policy are accepted, and each bound socket's workload has its row and only configured providers."""
    (tmp_path / "policy.yaml").write_text(documents["ConfigMap"]["data"]["policy.yaml"])

    policy = load_policy(tmp_path / "policy.yaml")

    assert {row.workload for row in policy.workloads} == {
        f"workload:{item.workload}" for item in configuration.listeners
    }
    assert {name for row in policy.workloads for name in row.providers} == {item.id for item in configuration.providers}


def test_every_path_of_the_configuration_is_mounted(configuration: Configuration, sidecar: dict[str, Any]) -> None:
    """Each file and socket that the configuration names lies in a directory that the sidecar mounts, or in the image."""
    named = [
        configuration.policy_file,
        configuration.store.path or "",
        configuration.hsm.module_path,
        configuration.hsm.pin_file,
        configuration.hsm.keys_file,
        *(item.address.removeprefix("unix:") for item in configuration.listeners),
        *(item.descriptor for item in configuration.providers),
        *(item.signing_certificate_file or "" for item in configuration.providers),
    ]

    homeless = [path for path in named if not any(str(parent) in _mounts(sidecar) for parent in Path(path).parents)]

    assert homeless == []
    assert sidecar["args"] == ["--config", "/etc/custody/custody.yaml"]


def test_the_application_reaches_its_socket_and_nothing_else(
    configuration: Configuration, application: dict[str, Any]
) -> None:
    """The application mounts one directory of the sidecar's, read-only, and finds its socket there; never the administrators'."""
    (api,) = [item for item in configuration.listeners if item.surface == "api"]
    (admin,) = [item for item in configuration.listeners if item.surface == "admin"]

    assert _mounts(application).keys() == {_directory(api.address)}
    assert all(mount["readOnly"] for mount in _mounts(application).values())
    assert {item["name"]: item["value"] for item in application["env"]}["CUSTODY_ADDRESS"] == api.address
    assert _directory(admin.address) != _directory(api.address)


def test_the_socket_can_be_reached_by_another_user(
    configuration: Configuration, pod: dict[str, Any], sidecar: dict[str, Any], application: dict[str, Any]
) -> None:
    """Application and sidecar are different users; they meet in the group of the directory, and the socket's mode lets it in."""
    (api,) = [item for item in configuration.listeners if item.surface == "api"]

    assert application["securityContext"]["runAsUser"] != sidecar["securityContext"]["runAsUser"]
    assert pod["securityContext"]["fsGroup"] == sidecar["securityContext"]["runAsGroup"]
    assert api.mode == "0660"


def test_the_sidecar_is_locked_in(pod: dict[str, Any], sidecar: dict[str, Any]) -> None:
    """Not root, no capabilities, no way to more rights, nothing to write to but its volumes, no token of the cluster."""
    context = sidecar["securityContext"]

    assert context["runAsUser"] == 65532
    assert context["readOnlyRootFilesystem"] is True
    assert context["allowPrivilegeEscalation"] is False
    assert context["capabilities"] == {"drop": ["ALL"]}
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True


def test_the_application_waits_for_the_sidecar_and_not_for_the_bank(sidecar: dict[str, Any]) -> None:
    """A native sidecar with a startup probe, so that the application starts after it; its readiness is not the application's."""
    assert sidecar["restartPolicy"] == "Always"
    assert sidecar["startupProbe"]["httpGet"]["path"] == "/startup"
    assert sidecar["livenessProbe"]["httpGet"]["path"] == "/livez"
    assert "readinessProbe" not in sidecar


def test_metrics_are_scraped_where_they_are_served(
    documents: dict[str, Any], configuration: Configuration, sidecar: dict[str, Any]
) -> None:
    """Annotation, container port and the configured address name the same port."""
    annotations = documents["StatefulSet"]["spec"]["template"]["metadata"]["annotations"]
    (port,) = sidecar["ports"]

    assert (
        annotations["prometheus.io/port"]
        == str(port["containerPort"])
        == configuration.operations_address.rpartition(":")[2]
    )


def test_the_pin_is_in_memory_and_only_the_sidecars(pod: dict[str, Any], application: dict[str, Any]) -> None:
    """The PIN is copied into memory with mode 0400 by the sidecar's own user; the application mounts neither copy nor Secret."""
    (copier,) = [container for container in pod["initContainers"] if container["name"] == "custody-pin"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}

    assert "--mode=0400" in copier["command"]
    assert copier["securityContext"]["runAsUser"] == 65532
    assert volumes["custody-pin"]["emptyDir"]["medium"] == "Memory"
    assert not {"custody-pin", "custody-pin-secret"} & {mount["name"] for mount in application["volumeMounts"]}


def test_every_mounted_volume_exists(documents: dict[str, Any], pod: dict[str, Any]) -> None:
    """No mount names a volume that the pod does not have, and no volume is there for nothing."""
    claimed = {claim["metadata"]["name"] for claim in documents["StatefulSet"]["spec"]["volumeClaimTemplates"]}
    volumes = {volume["name"] for volume in pod["volumes"]} | claimed

    mounted = {
        mount["name"] for container in pod["initContainers"] + pod["containers"] for mount in container["volumeMounts"]
    }

    assert mounted == volumes
