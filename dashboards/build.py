"""The dashboards that there are, and the files that hold them.

In: the options of a user. Out: file names and their content, as JSON for Grafana's import and provisioning
or as ConfigMaps for the dashboard sidecar of Grafana's charts.
"""

from __future__ import annotations

import yaml

from dashboards.board import Board, Builder, Options, as_text
from dashboards.boards import (
    alerts,
    anomalies,
    compute_map,
    cost,
    cuda_memory,
    experts,
    gpu,
    health,
    jobs,
    requests,
    tenants,
)

BUILDERS: tuple[Builder, ...] = (
    compute_map.board,
    gpu.board,
    requests.board,
    experts.board,
    tenants.board,
    cost.board,
    cuda_memory.board,
    anomalies.board,
    jobs.board,
    alerts.board,
    health.board,
)
FOLDER = "GPUGlass"
MAX_BYTES = 1 << 20
"""A ConfigMap's limit."""


def boards(options: Options) -> tuple[Board, ...]:
    """All dashboards, in the order in which they are listed."""
    return tuple(builder(options) for builder in BUILDERS)


def files(options: Options) -> dict[str, str]:
    """Name and content of each JSON file."""
    return {f"{board.uid}.json": as_text(board, options) for board in boards(options)}


def configmaps(options: Options, namespace: str = "") -> dict[str, str]:
    """Name and content of a ConfigMap manifest for each dashboard, as the sidecar of Grafana's charts
    takes them."""
    made = {}
    for name, text in files(options).items():
        uid = name.removesuffix(".json")
        metadata: dict[str, object] = {
            "name": uid,
            "labels": {"grafana_dashboard": "1", "app.kubernetes.io/part-of": "gpuglass"},
            # Read where the sidecar has folderAnnotation set to this name; otherwise it changes nothing.
            "annotations": {"grafana_folder": FOLDER},
        }
        if namespace:
            metadata["namespace"] = namespace
        manifest = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {name: text}}
        made[f"{uid}.yaml"] = yaml.safe_dump(manifest, sort_keys=False, width=1 << 20)
    return made
