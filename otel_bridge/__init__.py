"""Requests, steps, kernels and allocations as OpenTelemetry spans and exemplars, exported by OTLP.

May import `gpuglass` and the ledger of `exporters.vllm`."""
