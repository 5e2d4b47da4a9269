"""Schemas that are not ours read the dashboards: Grafana's models, its types of panel options, its linter."""

from __future__ import annotations

import copy
import importlib
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from dashboards.board import SCHEMA_VERSION
from dashboards.evaluate import panels_of
from dashboards.read import GENERATED
from tests.support import npm, tools

FILES = sorted(GENERATED.glob("*.json"))
COMPONENTS = {
    "timeseries": "timeseries",
    "stat": "stat",
    "table": "table",
    "heatmap": "heatmap",
    "bargauge": "bargauge",
    "state-timeline": "statetimeline",
    "text": "text",
}
"""Panel types, and Grafana's names of their schemas."""
LINT = Path(__file__).parents[2] / "dashboards" / "generated" / ".lint"


def load(path: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(path.read_text())
    return data


# grafana-foundation-sdk


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_grafanas_models_read_every_dashboard_and_panel(path: Path) -> None:
    """What the model does not know it drops, so what it writes back must hold all that we wrote."""
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.models import dashboard as model

    data = load(path)
    read = model.Dashboard.from_json(copy.deepcopy(data))
    assert read.uid == data["uid"] and read.schema_version == SCHEMA_VERSION
    assert read.panels is not None and len(read.panels) == len(data["panels"])
    written = json.loads(JSONEncoder(sort_keys=True).encode(read))
    assert lost(data, written) == []
    for panel in panels_of(data):
        component = importlib.import_module(f"grafana_foundation_sdk.models.{COMPONENTS[panel['type']]}")
        options = component.Options.from_json(copy.deepcopy(panel["options"]))
        back = json.loads(JSONEncoder(sort_keys=True).encode(options))
        unknown = [fault for fault in lost(panel["options"], back) if fault not in NEWER]
        assert unknown == [], panel["title"]


NEWER = frozenset({".selectionMode", ".maxVizHeight", ".namePlacement", ".legend.showLegend"})
"""Options that Grafana's types have and this release of its models does not."""


def lost(ours: Any, theirs: Any, where: str = "") -> list[str]:
    """Paths of what is in ours and not in theirs; `null` and what is empty may be left out."""
    if isinstance(ours, dict):
        if not isinstance(theirs, dict):
            return [where] if ours else []
        found = []
        for key, value in ours.items():
            if key in theirs:
                found += lost(value, theirs[key], f"{where}.{key}")
            elif value not in (None, [], {}, "", False):
                found.append(f"{where}.{key}")
        return found
    if isinstance(ours, list) and isinstance(theirs, list):
        if len(ours) != len(theirs):
            return [where]
        return [fault for mine, other in zip(ours, theirs, strict=True) for fault in lost(mine, other, where)]
    return [] if ours == theirs or (ours in ([], None) and not theirs) else [where]


def test_what_a_model_drops_is_noticed() -> None:
    assert lost({"a": {"b": 1}, "c": [1]}, {"a": {}, "c": [1]}) == [".a.b"]
    assert lost({"a": None, "b": [{"c": 2}]}, {"b": [{"c": 3}]}) == [".b.c"]


# TypeScript


PLAIN = """
type Plain<T> = T extends string ? `${T}` : T extends (infer U)[] ? Plain<U>[]
  : T extends object ? { [K in keyof T]: Plain<T[K]> } : T;
"""
"""A type as JSON has it: Grafana's enumerations are their texts."""


def typescript(panels: list[dict[str, Any]]) -> str:
    """A program that compiles only if all options, and what else is typed, fit Grafana's types."""
    kinds = sorted({panel["type"] for panel in panels})
    lines = [PLAIN]
    for kind in kinds:
        name = COMPONENTS[kind]
        type_file = f"@grafana/schema/dist/types/raw/composable/{name}/panelcfg/x/types.gen"
        lines.append(f"import type * as {name} from '{type_file}';")
    for number, panel in enumerate(panels):
        name = COMPONENTS[panel["type"]]
        lines.append(
            f"export const options{number}: Partial<Plain<{name}.Options>> = {json.dumps(panel['options'])};"
        )
        custom = panel.get("fieldConfig", {}).get("defaults", {}).get("custom")
        if custom and name in ("timeseries", "heatmap", "statetimeline"):
            lines.append(
                f"export const custom{number}: Partial<Plain<{name}.FieldConfig>> = {json.dumps(custom)};"
            )
    return "\n".join(lines) + "\n"


def compiled(program: str, folder: Path) -> list[str]:
    """What the compiler says against a program."""
    modules = npm.GRAFANA_SCHEMA.folder()
    assert modules
    (folder / "check.ts").write_text(program)
    (folder / "node_modules").symlink_to(modules / "node_modules")
    settings = {
        "compilerOptions": {
            "strict": True,
            "noEmit": True,
            "skipLibCheck": True,
            "module": "esnext",
            "moduleResolution": "node",
            "target": "es2022",
            "types": [],
        },
        "files": ["check.ts"],
    }
    (folder / "tsconfig.json").write_text(json.dumps(settings))
    done = subprocess.run(
        ["node", str(modules / "node_modules" / "typescript" / "bin" / "tsc"), "-p", str(folder)],
        capture_output=True,
        text=True,
    )
    return done.stdout.splitlines() if done.returncode else []


def unique(panels: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Panels with different options."""
    return list(
        {
            json.dumps(
                [
                    panel["type"],
                    panel["options"],
                    panel.get("fieldConfig", {}).get("defaults", {}).get("custom"),
                ]
            ): panel
            for panel in panels
        }.values()
    )


@pytest.mark.needs("node", "grafana-schema")
def test_the_compiler_takes_the_options_of_every_panel(tmp_path: Path) -> None:
    panels = unique([panel for path in FILES for panel in panels_of(load(path))])
    assert {panel["type"] for panel in panels} == COMPONENTS.keys()
    assert compiled(typescript(panels), tmp_path) == []


@pytest.mark.needs("node", "grafana-schema")
@pytest.mark.parametrize(
    ("kind", "path", "wrong"),
    [
        ("heatmap", ("options", "color", "scale"), "cubic"),
        ("heatmap", ("options", "calculate"), "no"),
        ("timeseries", ("options", "legend", "placement"), "top"),
        ("timeseries", ("fieldConfig", "defaults", "custom", "drawStyle"), "dots"),
        ("stat", ("options", "graphMode"), "bars"),
        ("table", ("options", "cellHeight"), 3),
        ("bargauge", ("options", "displayMode"), "pretty"),
    ],
)
def test_the_compiler_refuses_wrong_options(
    tmp_path: Path, kind: str, path: tuple[str, ...], wrong: object
) -> None:
    panel = next(copy.deepcopy(p) for f in FILES for p in panels_of(load(f)) if p["type"] == kind)
    place = panel
    for key in path[:-1]:
        place = place[key]
    assert path[-1] in place
    place[path[-1]] = wrong
    assert compiled(typescript([panel]), tmp_path)


# dashboard-linter


def lint(path: Path) -> subprocess.CompletedProcess[str]:
    program = tools.DASHBOARD_LINTER.program("dashboard-linter")
    assert program
    return subprocess.run(
        [program, "lint", "--strict", "--verbose", "--config", str(LINT), str(path)],
        capture_output=True,
        text=True,
    )


@pytest.mark.needs("dashboard-linter")
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_linter_finds_nothing(path: Path) -> None:
    done = lint(path)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.needs("dashboard-linter")
def test_the_linter_finds_what_is_wrong(tmp_path: Path) -> None:
    data = load(FILES[0])
    panel = next(panel for panel in panels_of(data) if panel["type"] == "stat")
    panel["targets"][0]["expr"] = "sum(rate("
    planted = tmp_path / "planted.json"
    planted.write_text(json.dumps(data))
    assert lint(planted).returncode != 0


def test_every_exception_for_the_linter_has_a_reason() -> None:
    import yaml

    rules = yaml.safe_load(LINT.read_text())["exclusions"]
    assert rules
    for rule, entry in rules.items():
        assert entry.get("reason") or all(one.get("reason") for one in entry["entries"]), rule
