"""The manifests of federations are right as far as that can be known without a cluster."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import yaml
from typer.main import get_command

from shardpar.cli.main import app
from shardpar.config.load import load_any
from shardpar.fl.net.keys import make_test_keys
from tests.deploy.schema import problems, read_schema
from tests.deploy.test_deploy import DEPLOY, FREE, ROOT, places

FILES = ("aggregator.yaml", "party.yaml")


def documents(name: str) -> dict[str, dict[str, Any]]:
    """By kind."""
    loaded = list(yaml.safe_load_all((DEPLOY / "federated" / name).read_text()))
    assert len({document["kind"] for document in loaded}) == len(loaded)
    return {document["kind"]: document for document in loaded}


def container_of(name: str) -> dict[str, Any]:
    (container,) = documents(name)["Job"]["spec"]["template"]["spec"]["containers"]
    return container


def given(name: str) -> dict[str, Any]:
    """What shardpar's own command line makes of a pod's command."""
    program, group, verb, *arguments = container_of(name)["command"]
    assert (program, group) == ("shardpar", "fl")
    command = get_command(app).commands["fl"].commands[verb]  # type: ignore[attr-defined]
    return command.make_context(verb, arguments).params


@pytest.mark.parametrize("name", FILES)
def test_a_manifest_has_only_fields_that_kubernetes_knows(name):
    for document in documents(name).values():
        assert problems(document, read_schema()) == []


@pytest.mark.parametrize("name", FILES)
def test_any_misspelt_field_is_noticed(name):
    schema = read_schema()
    for document in documents(name).values():
        for *above, key in places(document):
            if above and above[-1] in {*FREE, "matchLabels", "selector"}:
                continue
            wrong = copy.deepcopy(document)
            inner = wrong
            for step in above:
                inner = inner[step]
            inner[f"{key}s"] = inner.pop(key)
            assert problems(wrong, schema), f"{'.'.join(map(str, above))}.{key}s is not noticed"


@pytest.mark.parametrize("name", FILES)
def test_pods_run_a_command_that_shardpar_understands(name):
    params = given(name)
    config, *overrides = params["config"]
    shared = [
        "net.parties=[hospital-a, hospital-b, hospital-c]", "data.clients=3", "federated.rounds=2"
    ]  # fmt: skip
    loaded = load_any(str(ROOT / "configs" / "fedavg_secure.gin"), [*shared, *overrides])
    mounts = {mount["name"]: mount["mountPath"] for mount in container_of(name)["volumeMounts"]}
    assert config.startswith(mounts["config"] + "/")
    assert params["run_dir"].startswith(mounts["runs"] + "/")
    assert loaded.net.certificates == mounts["keys"]
    assert [*loaded.net.address_of()] == [loaded.net.aggregator]
    if name == "party.yaml":
        assert params["party"] in loaded.net.parties


def test_the_port_is_the_same_wherever_it_stands():
    served, joined = (given(name)["config"][1] for name in FILES)
    assert served.endswith(":7400']")
    assert joined.endswith(":7400']")
    found = documents("aggregator.yaml")
    (port,) = container_of("aggregator.yaml")["ports"]
    (service,) = found["Service"]["spec"]["ports"]
    (ingress,) = found["NetworkPolicy"]["spec"]["ingress"]
    egress = documents("party.yaml")["NetworkPolicy"]["spec"]["egress"][0]
    assert port["containerPort"] == service["port"] == 7400
    assert service["targetPort"] == port["name"]
    assert [p["port"] for p in (*ingress["ports"], *egress["ports"])] == [7400, 7400]


@pytest.mark.parametrize("name", FILES)
def test_what_a_pod_names_is_there_and_is_its_own(name):
    found = documents(name)
    template = found["Job"]["spec"]["template"]
    pod, container = template["spec"], container_of(name)
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    claims = {
        v["persistentVolumeClaim"]["claimName"]
        for v in pod["volumes"]
        if "persistentVolumeClaim" in v
    }
    assert found["PersistentVolumeClaim"]["metadata"]["name"] in claims
    (rule,) = found["Job"]["spec"]["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["containerName"] == container["name"]
    assert rule["onExitCodes"]["values"] == [2]
    # A Job refuses a policy with any other.
    assert pod["restartPolicy"] == "Never"
    labels = template["metadata"]["labels"]
    policy = found["NetworkPolicy"]["spec"]
    assert policy["podSelector"]["matchLabels"] == labels
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    if "Service" in found:
        assert found["Service"]["spec"]["selector"] == labels


def test_the_aggregator_dials_nobody_and_nobody_dials_a_party():
    assert documents("aggregator.yaml")["NetworkPolicy"]["spec"]["egress"] == []
    assert documents("party.yaml")["NetworkPolicy"]["spec"]["ingress"] == []
    assert "ports" not in container_of("party.yaml")


@pytest.mark.parametrize(("name", "party"), [(FILES[0], "aggregator"), (FILES[1], "hospital-a")])
def test_the_files_of_keys_that_are_named_are_those_that_exist(name, party, tmp_path):
    parties = ["hospital-a", "hospital-b", "hospital-c"]
    make_test_keys(tmp_path / "keys", ["aggregator", *parties])
    text = (DEPLOY / "federated" / name).read_text()
    named = {word.removeprefix("--from-file=") for word in text.split() if "--from-file=" in word}
    needed = {"ca.pem", f"{party}.pem", f"{party}.key", *(f"{p}.sign.pub" for p in parties)}
    if party != "aggregator":
        needed.add(f"{party}.sign.key")
    assert named - {"federation.gin"} == needed
    assert all((tmp_path / "keys" / file).is_file() for file in needed)
