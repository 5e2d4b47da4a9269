"""`gpuglass metrics`: the catalog as a table, as JSON, as Markdown, and inside of a Markdown file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gpuglass import catalog, cli
from gpuglass.family import Family, Kind, Owner, Tier
from gpuglass.metrics_command import BEGIN, END, as_dict, markdown, table

GAUGE = Family(
    "gpuglass_test_watts",
    Kind.GAUGE,
    "Power | heat of a card.",
    ("device", "pod"),
    "watts",
    absent="No card.",
)


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(["metrics", *arguments]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(["metrics", *arguments]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    return err


def names_in(table: str) -> list[str]:
    return [line.partition("{")[0] for line in table.splitlines() if not line.startswith(" ")]


def test_the_table_has_every_family_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert names_in(said(capsys)) == list(catalog.BY_NAME)


def test_the_table_says_what_a_family_is_and_what_its_absence_means() -> None:
    assert table([GAUGE], 110, bold=False) == [
        "gpuglass_test_watts{device, pod}",
        "    gauge, slow tier, agent. Power | heat of a card.",
        "    Absent: No card.",
    ]


def test_lines_keep_to_the_width_and_only_a_terminal_gets_escapes() -> None:
    families = list(catalog.BY_NAME.values())
    assert all(len(line) <= 60 for line in table(families, 60, bold=False) if line.startswith(" "))
    assert "\033" not in "".join(table(families, 60, bold=False))
    assert table([GAUGE], 60, bold=True)[0] == "\033[1mgpuglass_test_watts\033[0m{device, pod}"


def test_json_is_the_whole_catalog_as_data(capsys: pytest.CaptureFixture[str]) -> None:
    listed = json.loads(said(capsys, "--json"))
    assert listed == [as_dict(family) for family in catalog.BY_NAME.values()]
    assert all(type(value) in (str, list) for entry in listed for value in entry.values())


def test_a_family_as_data() -> None:
    assert as_dict(GAUGE) == {
        "name": "gpuglass_test_watts",
        "type": "gauge",
        "unit": "watts",
        "labels": ["device", "pod"],
        "tier": "slow",
        "owner": "agent",
        "help": "Power | heat of a card.",
        "absent": "No card.",
    }


def test_markdown_has_a_row_for_every_family(capsys: pytest.CaptureFixture[str]) -> None:
    rows = said(capsys, "--markdown").splitlines()
    assert [row.split("`")[1] for row in rows[2:]] == list(catalog.BY_NAME)


def test_markdown_escapes_what_would_end_a_cell() -> None:
    rows = markdown([GAUGE]).splitlines()
    assert rows[2] == (
        "| `gpuglass_test_watts` | gauge | `device`, `pod` | slow | Power \\| heat of a card. | No card. |"
    )
    assert rows[1].count("|") == rows[2].replace("\\|", "").count("|")


@pytest.mark.parametrize(
    ("arguments", "chosen"),
    [
        (["memory"], lambda f: "memory" in f.name),
        (["--tier", "fast"], lambda f: f.tier is Tier.FAST),
        (["--owner", "agent"], lambda f: f.owner is Owner.AGENT),
        (["--tier", "slow", "pcie"], lambda f: f.tier is Tier.SLOW and "pcie" in f.name),
    ],
)
def test_filters_choose(capsys: pytest.CaptureFixture[str], arguments: list[str], chosen: object) -> None:
    assert callable(chosen)
    expected = [family.name for family in catalog.BY_NAME.values() if chosen(family)]
    assert expected
    assert names_in(said(capsys, *arguments)) == expected


@pytest.mark.parametrize("form", [[], ["--json"], ["--markdown"]])
def test_a_filter_without_a_match_is_an_error(capsys: pytest.CaptureFixture[str], form: list[str]) -> None:
    assert "no family matches" in refused(capsys, "no_such_thing", *form)
    assert "no family matches" in refused(capsys, "--tier", "fast", "pcie", *form)


# A table inside of a file

HEAD, TAIL = f"# Metrics\n\n{BEGIN}\n", f"{END}\n\nMore.\n"


def test_write_changes_what_is_between_the_marks_only(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "README.md"
    file.write_text(f"{HEAD}an older table\n{TAIL}")
    assert said(capsys, "--write", str(file)) == ""
    text = file.read_text()
    assert text.startswith(HEAD)
    assert text.endswith(TAIL)
    assert markdown(catalog.BY_NAME.values()) in text
    assert "an older table" not in text


def test_check_takes_what_write_wrote_and_changes_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "README.md"
    file.write_text(f"{HEAD}{TAIL}")
    assert "out of date; run `gpuglass metrics --write" in refused(capsys, "--check", str(file))
    assert file.read_text() == f"{HEAD}{TAIL}"
    said(capsys, "--write", str(file))
    written = file.read_text()
    assert said(capsys, "--check", str(file)) == ""
    said(capsys, "--write", str(file))
    assert file.read_text() == written
    file.write_text(written.replace("`gpuglass_gpus`", "`gpuglass_gpu`"))
    refused(capsys, "--check", str(file))


@pytest.mark.parametrize("text", ["", f"{BEGIN}\n", f"{END}\n{BEGIN}\n", "# Metrics\n"])
@pytest.mark.parametrize("action", ["--write", "--check"])
def test_a_file_without_both_marks_is_refused_and_left_alone(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, action: str, text: str
) -> None:
    file = tmp_path / "README.md"
    file.write_text(text)
    assert "to write between" in refused(capsys, action, str(file))
    assert file.read_text() == text


@pytest.mark.parametrize("action", ["--write", "--check"])
def test_a_file_that_cannot_be_read_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, action: str
) -> None:
    assert "cannot read it: No such file" in refused(capsys, action, str(tmp_path / "none.md"))
    assert "cannot read it: Is a directory" in refused(capsys, action, str(tmp_path))
    (tmp_path / "latin.md").write_bytes(b"\xff")
    assert "cannot read it: not UTF-8" in refused(capsys, action, str(tmp_path / "latin.md"))


def test_a_filter_without_a_match_writes_no_empty_table(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "README.md"
    file.write_text(f"{HEAD}{TAIL}")
    refused(capsys, "--write", str(file), "no_such_thing")
    assert file.read_text() == f"{HEAD}{TAIL}"


def test_one_form_at_a_time(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["metrics", "--json", "--markdown"])
    assert end.value.code == 2
    assert "not allowed with" in capsys.readouterr().err
