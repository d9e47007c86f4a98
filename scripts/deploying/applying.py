"""Makes an endpoint what its file says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from scripts.deploying.answers import checked_endpoint
from scripts.deploying.api import Api, Json
from scripts.deploying.endpoint import (
    Change,
    Fields,
    create_body,
    deployed_fields,
    differences,
    env_of,
    refuse_another_family,
    refuse_contradictions,
    update_body,
    wanted_fields,
)
from scripts.deploying.files import DeployError, EndpointFile, base_name, jobs_too_long
from scripts.deploying.hiding import Secrets

ENDPOINTS, VOLUMES = "/serverless", "/network-volumes"


@dataclass(frozen=True)
class Plan:
    """What is deployed (None: nothing), and what is to be changed."""

    file: EndpointFile
    deployed: Json | None
    wanted: Fields
    changes: tuple[Change, ...]

    @property
    def execution_timeout_s(self) -> float | None:
        """Once it is applied; None where RunPod does not say."""
        fields = deployed_fields(self.deployed or {}) | self.wanted
        return fields["execution_timeout_s"] or None


class Deployments:
    """The endpoints of an account.

    Args:
        endpoint_id: which of several of a name is meant.
    """

    def __init__(self, api: Api, secrets: Secrets, endpoint_id: str | None = None) -> None:
        self._api = api
        self._secrets = secrets
        self._endpoint_id = endpoint_id

    def find(self, name: str) -> Json | None:
        """The endpoint of a name.

        Raises:
            DeployError: when there are several.
        """
        named = [each for each in self._api.all_of(ENDPOINTS, "endpoints") if _is_called(each, name)]
        if self._endpoint_id is not None:
            named = [each for each in named if each.get("id") == self._endpoint_id]
            if not named:
                raise DeployError(f"--id {self._endpoint_id}: no endpoint {name!r} has it")
        if len(named) > 1:
            ids = ", ".join(str(each.get("id")) for each in named)
            raise DeployError(f"{len(named)} endpoints are called {name!r} ({ids}); say which with --id")
        if not named:
            return None
        endpoint = checked_endpoint(named[0])
        self._secrets.add_env(env_of(endpoint))
        return endpoint

    def must_find(self, name: str) -> Json:
        found = self.find(name)
        if found is None:
            raise DeployError(f"no endpoint is called {name!r}")
        return found

    def plan(self, file: EndpointFile) -> Plan:
        """How what is deployed differs from a file.

        Raises:
            DeployError: also when the file does not go together with what it leaves as it is.
        """
        deployed = self.find(file.name)
        fields = deployed_fields(deployed or {})
        wanted = wanted_fields(file, self._volume_id(file), None if deployed is None else fields)
        if deployed is not None:
            refuse_another_family(deployed, file)
        refuse_contradictions(file.name, wanted, fields)
        plan = Plan(file, deployed, wanted, tuple(differences(fields, wanted)))
        for wrong in jobs_too_long(file, plan.execution_timeout_s):
            raise DeployError(wrong)
        return plan

    def apply(self, plan: Plan) -> Json:
        """Create or update, and look whether it came out as wanted.

        Raises:
            DeployError: also when RunPod has taken it and answers something else.
        """
        name, deployed = plan.file.name, plan.deployed
        changes: Sequence[Change] = plan.changes
        if deployed is None:
            body = create_body(plan.file, plan.wanted)
            deployed = self._api.create(ENDPOINTS, body, lambda: self.find(name))
            deployed = self._get(deployed["id"])
            changes = differences(deployed_fields(deployed), plan.wanted)
        if changes:
            body = update_body(changes, plan.wanted, deployed_fields(deployed))
            self._api.update(f"{ENDPOINTS}/{deployed['id']}", body)
            deployed = self._get(deployed["id"])
        left = differences(deployed_fields(deployed), plan.wanted)
        if left:
            names = ", ".join(change.field for change in left)
            raise DeployError(f"{name}: RunPod has taken it, but these are not as in the file: {names}")
        return deployed

    def _get(self, endpoint_id: str) -> Json:
        return checked_endpoint(self._api.get(f"{ENDPOINTS}/{endpoint_id}"))

    def delete(self, endpoint: Json) -> None:
        self._api.delete(f"{ENDPOINTS}/{endpoint['id']}")

    def _volume_id(self, file: EndpointFile) -> str | None:
        """Of the file's network volume, which it calls by name or by id."""
        if not file.network_volume:
            return None
        volumes = self._api.all_of(VOLUMES, "networkVolumes")
        found = [each for each in volumes if file.network_volume in (each.get("id"), each.get("name"))]
        if len(found) != 1:
            known = ", ".join(f"{each.get('name')} ({each.get('id')})" for each in found or volumes)
            how_many = "several are" if found else "none is"
            raise DeployError(
                f"network_volume: {how_many} called {file.network_volume!r}; there are: {known or 'none'}"
            )
        place = found[0].get("dataCenter")
        if file.data_centers and place not in file.data_centers:
            raise DeployError(f"network_volume: {file.network_volume} is in {place}, which data_centers leaves out")
        return str(found[0]["id"])


def _is_called(endpoint: Json, name: str) -> bool:
    return base_name(str(endpoint.get("name", ""))) == name
