"""What GPUs cost, as the operator configured it (`exporters/gpu/prices.py`)."""

from __future__ import annotations

from gpuglass.family import Family, Kind

GPU_HOUR = Family(
    "gpuglass_gpu_price_per_hour",
    Kind.GAUGE,
    "Price of an hour of a GPU of a model, as the configuration says; example is true while it is a "
    "placeholder. Every agent says the same: read it through max by (model, currency).",
    ("model", "currency", "example"),
    absent="The configuration has no price for the model or gives it by a pattern, and no agent has seen "
    "such a card.",
)
