"""`gpuglass dashboards` as a user calls it; previews from a real Prometheus."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dashboards import links
from dashboards.evaluate import Range, Series, fill, name_of, requests, round_step, seconds
from dashboards.read import GENERATED
from dashboards.units import text_of
from gpuglass.cli import main
from tests.dashboards.conftest import END, World
from tests.support.ports import free_port


def test_build_writes_what_is_committed(tmp_path: Path) -> None:
    assert main(["dashboards", "build", "--out", str(tmp_path / "new")]) == 0
    made = {path.name: path.read_text() for path in (tmp_path / "new").iterdir()}
    assert made == {path.name: path.read_text() for path in GENERATED.glob("*.json")}


def test_build_writes_configmaps(tmp_path: Path) -> None:
    assert (
        main(["dashboards", "build", "--out", str(tmp_path), "--format", "configmap", "--namespace", "m"])
        == 0
    )
    assert {path.suffix for path in tmp_path.iterdir()} == {".yaml"}


def test_check_tells_faults_and_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dashboards", "check"]) == 0
    assert main(["dashboards", "build", "--out", str(tmp_path), "--traces", "jaeger"]) == 0
    assert main(["dashboards", "check", "--dir", str(tmp_path), "--traces", "jaeger"]) == 0
    capsys.readouterr()
    assert main(["dashboards", "check", "--dir", str(tmp_path)]) == 1
    assert "is out of date; run `gpuglass dashboards build" in capsys.readouterr().err
    assert main(["dashboards", "check", "--dir", str(tmp_path), "--write"]) == 0
    assert main(["dashboards", "check", "--dir", str(tmp_path), "--check"]) == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["build", "--out", "x", "--namespace", "m"], "add --format configmap"),
        (
            ["preview", "--prometheus", "URL", "--out", "OUT", "--only", "gpuglass-nothing"],
            "no such dashboard; there are gpuglass-compute-map",
        ),
        (["preview", "--prometheus", "URL", "--out", "OUT", "--var", "model_name"], "write it as NAME=VALUE"),
        (["preview", "--prometheus", "URL", "--out", "OUT", "--var", "pod=x"], "has no such variable"),
    ],
)
def test_bad_use_is_one_line(
    tmp_path: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    there = {"URL": f"http://127.0.0.1:{free_port()}", "OUT": str(tmp_path)}
    assert main(["dashboards", *(there.get(argument, argument) for argument in arguments)]) == 2
    message = capsys.readouterr().err.strip()
    assert said in message and "\n" not in message


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["build", "--out", "/proc/none/x"], "--out /proc/none/x: cannot write there"),
        (["preview", "--prometheus", "URL", "--out", "OUT"], "no answer of a Prometheus there"),
    ],
)
def test_what_fails_is_one_line(
    tmp_path: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    there = {"URL": f"http://127.0.0.1:{free_port()}", "OUT": str(tmp_path)}
    assert main(["dashboards", *(there.get(argument, argument) for argument in arguments)]) == 1
    message = capsys.readouterr().err.strip()
    assert said in message and "\n" not in message


@pytest.mark.timeout(900)
def test_previews_are_drawn_from_live_data(world: World, tmp_path: Path) -> None:
    from PIL import Image

    drawn = [links.COMPUTE_MAP, links.ALERTS]
    only = [argument for uid in drawn for argument in ("--only", uid)]
    arguments = [
        "dashboards",
        "preview",
        "--prometheus",
        world.prometheus.url,
        "--out",
        str(tmp_path),
        "--at",
        str(END),
    ]
    assert main([*arguments, *only]) == 0
    for uid in drawn:
        path = tmp_path / f"{uid}.png"
        with Image.open(path) as picture:
            assert picture.width > 900 and picture.height > 600
            assert len(picture.convert("RGB").getcolors(1 << 16) or ()) > 20, "not an empty sheet"
        assert path.stat().st_size < 200 << 10


def test_pictures_of_all_dashboards_are_committed_and_small() -> None:
    folder = GENERATED.parent / "pictures"
    assert {path.stem for path in folder.glob("*.png")} == set(links.UIDS)
    assert all(path.stat().st_size < 200 << 10 for path in folder.glob("*.png"))


def test_the_page_lists_every_dashboard_with_its_picture() -> None:
    page = (GENERATED.parent / "README.md").read_text()
    for uid in links.UIDS:
        assert f"pictures/{uid}.png" in page and f"generated/{uid}.json" in page


# How Grafana asks


def test_steps_follow_width_and_range() -> None:
    panel = {
        "maxDataPoints": 900,
        "interval": "1s",
        "targets": [{"refId": "A", "expr": "x[$__rate_interval] $__range_s"}],
    }
    (request,) = requests(panel, Range(0, 300), {})
    assert (request.step, request.expr) == (1, "x[4s] 300")
    (request,) = requests(panel, Range(0, 86_400), {})
    assert (request.step, request.expr) == (120, "x[121s] 86400")
    (request,) = requests({"targets": [{"refId": "A", "expr": "x[$__interval]"}]}, Range(0, 3_600), {})
    assert (request.step, request.expr) == (15, "x[15s]")
    (request,) = requests({"targets": [{"refId": "A", "expr": "x", "instant": True}]}, Range(0, 3_600), {})
    assert request.step == 0


def test_variables_are_filled_as_patterns() -> None:
    chosen = {"a": ".*", "b": ["x.y", "z"], "c": ["x.y"]}
    assert (
        fill('{a=~"$a", b=~"${b}", c=~"$c"} $1 $d', chosen, {})
        == '{a=~".*", b=~"(x\\\\.y|z)", c=~"x\\\\.y"} $1 $d'
    )


def test_names_of_series() -> None:
    series = Series({"__name__": "x", "a": "1", "b": "2"}, [])
    assert name_of(series, "{{a}} on {{ c }}") == "1 on "
    assert name_of(series, "__auto") == "a=1, b=2"


def test_durations_and_steps() -> None:
    assert (seconds("5m"), seconds("1h30m"), seconds("500ms")) == (300, 5_400, 0.5)
    with pytest.raises(ValueError, match="no duration"):
        seconds("soon")
    assert [round_step(value) for value in (0.3, 1, 11, 100, 90_000)] == [1, 1, 15, 120, 172_800]


@pytest.mark.parametrize(
    ("value", "unit", "decimals", "shown"),
    [
        (0.5, "percentunit", 0, "50%"),
        (2_030.0, "watt", None, "2.03 kW"),
        (3 * 2.0**30, "bytes", 1, "3.0 GiB"),
        (12.0, "bytes", None, "12 B"),
        (0.012, "s", None, "12 ms"),
        (7_200.0, "s", None, "2 h"),
        (1_500.0, "short", None, "1.5 K"),
        (float("nan"), "short", None, "–"),
        (float("inf"), "s", None, "∞"),
        (1_764_158_400_000.0, "dateTimeAsIso", None, "2025-11-26 12:00"),
    ],
)
def test_values_are_readable(value: float, unit: str, decimals: int | None, shown: str) -> None:
    assert text_of(value, unit, decimals) == shown


def test_every_file_is_classic_json() -> None:
    for path in GENERATED.glob("*.json"):
        data = json.loads(path.read_text())
        assert data["schemaVersion"] == 39 and "elements" not in data and "apiVersion" not in data
        assert data["uid"] == path.stem and not data["editable"]
