"""Exemplars fit into OpenMetrics' 128 characters and name what was most wanted."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuglass.exemplar import (
    MAX_CHARACTERS,
    NameByRequest,
    RequestRef,
    exemplar,
    fit,
    is_trace_id,
    newer,
    side_by_side,
)

TRACE = "0af7651916cd43dd8448eb211c80319c"
OTHER_TRACE = "1bf7651916cd43dd8448eb211c80319c"
CHAT = "chatcmpl-6f6cd43dd8448eb211c80319ccd0af71-0a1b2c3d"


def names(request: RequestRef) -> dict[str, str]:
    return fit(NameByRequest().names(request))


@pytest.mark.parametrize(
    ("request_ref", "expected"),
    [
        (RequestRef(""), {}),
        (RequestRef("r1"), {"request_id": "r1"}),
        (RequestRef("r1", "", TRACE), {"trace_id": TRACE, "request_id": "r1"}),
        (RequestRef("r1", "", TRACE.upper()), {"request_id": "r1"}),
        (RequestRef("r1", "", "0" * 32), {"request_id": "r1"}),
        (RequestRef("x-1-0a1b2c3d", "x-1"), {"request_id": "x-1-0a1b2c3d"}),
        (RequestRef("r1", "x"), {"request_id": "r1", "external_id": "x"}),
        (RequestRef("r" * 78, "", TRACE), {"trace_id": TRACE, "request_id": "r" * 78}),
        (RequestRef("r" * 79, "", TRACE), {"trace_id": TRACE}),
        (RequestRef("r" * 100, "x" * 20), {"request_id": "r" * 100}),
        (RequestRef('r"1\\2\n'), {"request_id": "r_1_2_"}),
        (RequestRef("r" * 128, "", ""), {"request_id": "r" * 118}),
    ],
)
def test_a_request_is_named_by_its_trace_then_by_its_ids_as_far_as_they_fit(
    request_ref: RequestRef, expected: dict[str, str]
) -> None:
    assert names(request_ref) == expected


def test_two_requests_with_traces_are_both_named() -> None:
    victim, holder = RequestRef(CHAT, "", TRACE), RequestRef(CHAT, "", OTHER_TRACE)
    both = side_by_side(NameByRequest().names(victim), NameByRequest().names(holder))
    assert fit(both) == {"trace_id": TRACE, "holder_trace_id": OTHER_TRACE}


def test_two_requests_of_vllm_without_traces_are_both_named() -> None:
    victim, holder = RequestRef(CHAT), RequestRef(CHAT)
    both = side_by_side(NameByRequest().names(victim), NameByRequest().names(holder))
    assert fit(both) == {"request_id": CHAT, "holder_request_id": CHAT}


@given(st.lists(st.tuples(st.text(st.characters(codec="ascii"), min_size=1, max_size=20), st.text())))
def test_labels_never_take_more_than_128_characters_and_the_first_is_never_left_out(
    wanted: list[tuple[str, str]],
) -> None:
    labels = fit(wanted)
    assert sum(len(name) + len(value) for name, value in labels.items()) <= MAX_CHARACTERS
    named = [name for name, value in wanted if value]
    assert not named or named[0] in labels


def test_an_exemplar_has_a_time_in_milliseconds_and_there_is_none_without_a_name() -> None:
    found = exemplar({"request_id": "r"}, 2.5, 1_790_000_000.12345)
    assert found is not None
    assert (found.value, found.timestamp) == (2.5, 1_790_000_000.123)
    assert exemplar({}, 2.5, 1_790_000_000.0) is None


def test_a_trace_id_is_32_small_hex_digits_and_not_all_zero() -> None:
    assert is_trace_id(TRACE)
    assert not any(map(is_trace_id, ("", "0" * 32, TRACE[:-1], TRACE + "0", TRACE + "\n", "g" * 32)))


def test_the_newer_of_two_is_kept_and_of_equally_old_ones_the_first() -> None:
    old, same, new = (exemplar({"request_id": name}, 1.0, at) for name, at in (("a", 5), ("b", 5), ("c", 6)))
    assert newer(None, old) is newer(old, None) is newer(old, same) is old
    assert newer(old, new) is newer(new, old) is new
    assert newer(None, None) is None
