"""The page about the record stream says what the schema says."""

from __future__ import annotations

import typing
from pathlib import Path

import pytest

from gpuglass_vllm import records
from tests.support import stream_page

PAGE = Path(__file__).parents[3] / "exporters/engine_probe/STREAM.md"


def test_its_tables_are_those_of_the_schema() -> None:
    assert stream_page.main(["--check", str(PAGE)]) == 0


def test_a_page_that_is_out_of_date_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stale = tmp_path / "page.md"
    stale.write_text(PAGE.read_text().replace("| `prompt_tokens` |", "| `prompt_words` |", 1))
    assert stream_page.main(["--check", str(stale)]) == 1
    assert "run `make generated`" in capsys.readouterr().err
    assert stream_page.main(["--write", str(stale)]) == 0
    assert stale.read_text() == PAGE.read_text()


def test_every_record_and_field_is_on_it() -> None:
    text = PAGE.read_text()
    for kind in typing.get_args(records.Record):
        section = text.partition(f"### `{kind.__struct_config__.tag}`\n")[2].partition("\n### ")[0]
        assert section, kind
        for name in kind.__struct_fields__:
            assert f"| `{name}` |" in section


def test_docstrings_of_fields_are_read_where_there_are_some() -> None:
    _, of_hello = stream_page.docstrings()["Hello"]
    assert of_hello["server"].startswith("Name that the operator gave the server")
    assert "model_name" not in of_hello
