"""Which steps are told one by one, and the pieces of prompts."""

from __future__ import annotations

from gpuglass_vllm.attribution import Batch, Ledger, New
from gpuglass_vllm.records import MAX_CHUNKS, NO_TENANT, StepSample
from gpuglass_vllm.step_samples import FIRSTS, REGULAR, Noted, StepSamples

SPAN = (10_000, 20_000, 300)


class Engine:
    """A ledger that sees steps, and samples of them."""

    def __init__(self, every: int = 0, chunks: bool = True) -> None:
        self.ledger = Ledger()
        self.samples = StepSamples(every, chunks)
        self.number = 0
        self.computed: dict[str, int] = {}

    def step(
        self,
        tokens: dict[str, int],
        new: dict[str, int] | None = None,
        busy_ns: float = 1000.0,
        **noted: bool,
    ) -> None:
        """Tokens for each request; `new` has the lengths of the prompts of those that begin."""
        new = new or {}
        self.number += 1
        old = [name for name in tokens if name not in new]
        batch = Batch(
            tuple(New(name, 0, length, NO_TENANT) for name, length in new.items()),
            old,
            [self.computed[name] for name in old],
            (),
            (),
            tokens,
            sum(tokens.values()),
        )
        for name, count in tokens.items():
            self.computed[name] = self.computed.get(name, 0) + count
        begin = self.number * 1_000_000
        seen = Noted(batch, self.number, begin, begin + 5000, **noted)
        self.samples.see(seen, self.ledger.observe(batch), busy_ns, lambda: SPAN)

    def told(self) -> list[StepSample]:
        return self.samples.take(77, True)

    def numbers(self) -> list[int]:
        return sorted(sample.step for sample in self.told())


def test_the_longest_step_is_told() -> None:
    engine = Engine()
    engine.step({"a": 4}, {"a": 4})
    engine.told()
    for busy in (10.0, 30.0, 20.0):
        engine.step({"a": 1}, busy_ns=busy)
    assert engine.numbers() == [3]
    assert engine.numbers() == []


def test_some_steps_in_which_requests_begin_are_told() -> None:
    engine = Engine()
    for number in range(FIRSTS + 3):
        engine.step({f"r{number}": 4}, {f"r{number}": 4}, busy_ns=1000.0 - number)
    assert engine.numbers() == list(range(1, FIRSTS + 2)), "and the longest of the others"


def test_every_nth_step_is_told_as_far_as_there_is_room() -> None:
    engine = Engine(every=10)
    engine.step({"a": 4}, {"a": 4}, busy_ns=1e9)
    engine.told()
    engine.step({"a": 1}, busy_ns=1e8)
    for _ in range(48):
        engine.step({"a": 1})
    assert engine.numbers() == [2, 10, 20, 30, 40, 50]
    for _ in range(500):
        engine.step({"a": 1})
    assert len(engine.told()) == REGULAR + 1


def test_without_a_turn_no_step_has_it() -> None:
    engine = Engine(every=0)
    engine.step({"a": 4}, {"a": 4})
    engine.told()
    for _ in range(300):
        engine.step({"a": 1})
    assert len(engine.told()) == 1


def test_a_profiled_step_is_told_whatever_it_was() -> None:
    engine = Engine()
    engine.step({"a": 4}, {"a": 4})
    engine.step({"a": 1}, busy_ns=1e9)
    engine.step({"a": 1}, profiled=True)
    assert engine.numbers() == [1, 2, 3]


def test_the_devices_time_is_told() -> None:
    engine = Engine()
    engine.step({"a": 4}, {"a": 4})
    (sample,) = engine.told()
    assert (sample.gpu_begin_ns, sample.gpu_end_ns, sample.gpu_error_ns) == SPAN


def test_every_piece_of_a_prompt_is_told_with_its_share() -> None:
    engine = Engine()
    engine.step({"a": 512}, {"a": 1200})
    engine.step({"a": 512})
    engine.step({"a": 176, "b": 100}, {"b": 100}, busy_ns=2760.0)
    engine.step({"a": 1, "b": 1})
    (told,) = engine.samples.take_chunks()
    assert list(zip(told.request_ids, told.tokens, strict=True)) == [
        ("a", 512),
        ("a", 512),
        ("b", 100),
        ("a", 176),
    ]
    assert told.begin_ns == [1_000_000, 2_000_000, 3_000_000, 3_000_000]
    assert told.end_ns == [1_005_000, 2_005_000, 3_005_000, 3_005_000]
    assert told.gpu_ns[:2] == [1000.0, 1000.0] and sum(told.gpu_ns[2:]) == 2760.0
    assert engine.samples.take_chunks() == []


def test_a_piece_ends_when_the_device_is_done() -> None:
    engine = Engine()
    batch = Batch((New("a", 0, 4, NO_TENANT),), [], [], (), (), {"a": 4}, 4)
    engine.samples.see(Noted(batch, 1, 5, 9), engine.ledger.observe(batch), 1000.0, lambda: SPAN)
    (told,) = engine.samples.take_chunks()
    assert (told.begin_ns, told.end_ns) == ([5], [20_000])


def test_other_ranks_tell_no_pieces() -> None:
    engine = Engine(chunks=False)
    engine.step({"a": 512}, {"a": 1200})
    assert engine.samples.take_chunks() == []


def test_records_of_many_pieces_stay_within_their_bound() -> None:
    engine = Engine()
    for number in range(3):
        names = {f"r{number}-{n}": 2 for n in range(200)}
        engine.step(dict(names), dict(names))
    told = engine.samples.take_chunks()
    assert [len(record.request_ids) for record in told] == [MAX_CHUNKS, MAX_CHUNKS, 600 - 2 * MAX_CHUNKS]


def test_in_a_large_batch_all_are_named_in_turn_and_those_with_most_tokens_always() -> None:
    engine = Engine(every=1)
    names = {f"r{n}": 1 for n in range(200)}
    engine.step(dict(names), dict(names))
    engine.told()
    engine.step({"big": 50}, {"big": 100})
    named: set[str] = set()
    for _ in range(12):
        engine.told()
        engine.step({**names, "big": 5})
        (sample,) = engine.told()
        assert len(sample.request_ids) == 64 and sample.requests == 201 and sample.request_ids[0] == "big"
        named |= set(sample.request_ids)
    assert named == {*names, "big"}
