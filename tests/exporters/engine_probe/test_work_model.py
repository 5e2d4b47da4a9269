"""The model of work: solved from an engine's answers, linear, never negative."""

from __future__ import annotations

import pytest

from gpuglass_vllm.work_model import BY_TOKENS, GRID, UNKNOWN, Device, device_by_name, fit


class Dense:
    """A model of a known cost: weights of 1 GB, 2 FLOP per parameter and token, KV of 1 kB per context
    token."""

    def flops(self, tokens: int, context: int, prefill: bool) -> float:
        return 1e9 * tokens + 4e4 * tokens * context

    def bytes(self, tokens: int, context: int, prefill: bool) -> float:
        return 1e9 + 5e3 * tokens + (2e3 if prefill else 1e3) * context


DEVICE = Device(1e12, 2e12, 1e11)


def test_coefficients_are_those_of_the_model() -> None:
    model = fit(Dense(), DEVICE)
    assert model.source == "model"
    assert model.decode.per_token_context == pytest.approx(4e4 / 1e12)
    assert model.decode.per_context == pytest.approx(1e3 / 1e11)
    assert model.prefill.per_context == pytest.approx(2e3 / 1e11)
    assert model.decode.flops_per_token == pytest.approx(1e9)
    assert model.decode.flops_per_token_context == pytest.approx(4e4)
    for tokens in (1, 64, 1024):
        expected = (1e9 / tokens + 5e3) / 1e11 + 1e9 / 1e12
        assert model.decode.token(tokens) == pytest.approx(expected)


def test_reading_the_weights_is_shared_by_the_tokens() -> None:
    model = fit(Dense(), DEVICE)
    costs = [model.decode.token(tokens) for tokens in GRID]
    assert costs == sorted(costs, reverse=True)
    assert model.decode.token(96) == pytest.approx((model.decode.token(64) + model.decode.token(128)) / 2)
    assert model.decode.token(10**6) == model.decode.token(GRID[-1])
    assert model.decode.token(0) == model.decode.token(1)


def test_eight_bits_are_twice_as_fast() -> None:
    assert fit(Dense(), DEVICE, bits8=True).decode.per_token_context == pytest.approx(4e4 / 2e12)


@pytest.mark.parametrize("answer", [0.0, float("nan"), float("inf"), -1.0])
def test_a_model_without_cost_is_refused(answer: float) -> None:
    class Broken:
        def flops(self, tokens: int, context: int, prefill: bool) -> float:
            return answer

        bytes = flops

    with pytest.raises(ValueError, match="no cost"):
        fit(Broken(), DEVICE)


def test_by_tokens_every_token_costs_the_same() -> None:
    assert BY_TOKENS.prefill.token(1) == BY_TOKENS.decode.token(1000) == 1


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H200", 989.4),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H20", 148),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA B200", 2250),
        ("NVIDIA A10G", 125),
        ("Tesla T4", 65),
    ],
)
def test_devices_are_found_by_the_drivers_name(name: str, tflops: float) -> None:
    device = device_by_name(name)
    assert device is not None
    assert device.flops == pytest.approx(tflops * 1e12)


@pytest.mark.parametrize("name", ["cpu", "", "NVIDIA GeForce RTX 3060", "NVIDIA T400 4GB"])
def test_unknown_devices_have_no_peak(name: str) -> None:
    assert device_by_name(name) is None
    assert UNKNOWN.flops > 0
