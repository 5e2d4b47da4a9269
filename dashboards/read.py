"""Which metrics the finished dashboards read, for `gpuglass rules keep-list`: what they show is to be kept.

In: the JSON files beside this module; grafanalib is not needed. Out: names of metrics, each of which is
a query.
"""

from __future__ import annotations

import json
from pathlib import Path

from dashboards.evaluate import panels_of
from dashboards.promql_scan import scan

GENERATED = Path(__file__).parent / "generated"


def queries() -> list[str]:
    """Names of all metrics of panels, variables and annotations, sorted."""
    names: set[str] = set()
    for path in sorted(GENERATED.glob("*.json")):
        data = json.loads(path.read_text(encoding="utf-8"))
        texts = [
            target["expr"]
            for panel in panels_of(data)
            for target in panel.get("targets", ())
            if "expr" in target
        ]
        texts += [annotation["expr"] for annotation in data["annotations"]["list"]]
        for entry in data["templating"]["list"]:
            if entry["type"] == "query":
                texts.append(entry["query"]["query"].removeprefix("label_values(").rpartition(",")[0])
        for text in texts:
            names |= scan(text).metrics
    return sorted(names)
