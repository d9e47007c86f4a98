"""Makes an endpoint what its file says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from scripts.deploying.api import Api, Json
from scripts.deploying.endpoint import (
    Change,
    Fields,
    create_body,
    deployed_fields,
    differences,
    env_of,
    refuse_another_family,
    update_body,
    wanted_fields,
)
from scripts.deploying.files import DeployError, EndpointFile
from scripts.deploying.hiding import Secrets

ENDPOINTS, VOLUMES = "/serverless", "/network-volumes"
_FLASHBOOT_MARK = " -fb"
"""RunPod's console appends it to the name of an endpoint with FlashBoot."""


@dataclass(frozen=True)
class Plan:
    """What is deployed (None: nothing), and what is to be changed."""

    file: EndpointFile
    deployed: Json | None
    wanted: Fields
    changes: tuple[Change, ...]


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
        self._secrets.add_env(env_of(named[0]))
        return named[0]

    def must_find(self, name: str) -> Json:
        found = self.find(name)
        if found is None:
            raise DeployError(f"no endpoint is called {name!r}")
        return found

    def plan(self, file: EndpointFile) -> Plan:
        """How what is deployed differs from a file."""
        deployed = self.find(file.name)
        wanted = wanted_fields(file, self._volume_id(file))
        if deployed is not None:
            refuse_another_family(deployed, file)
        return Plan(file, deployed, wanted, tuple(differences(deployed_fields(deployed or {}), wanted)))

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
            deployed = self._api.get(f"{ENDPOINTS}/{deployed['id']}")
            changes = differences(deployed_fields(deployed), plan.wanted)
        if changes:
            path = f"{ENDPOINTS}/{deployed['id']}"
            self._api.update(path, update_body(list(changes), plan.wanted))
            deployed = self._api.get(path)
        left = differences(deployed_fields(deployed), plan.wanted)
        if left:
            names = ", ".join(change.field for change in left)
            raise DeployError(f"{name}: RunPod has taken it, but these are not as in the file: {names}")
        return deployed

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
    return str(endpoint.get("name", "")).removesuffix(_FLASHBOOT_MARK) == name
