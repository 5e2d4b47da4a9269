"""Receiver of the engine probe's records, request ledger, and the KV-cache, expert, tenant and GPU-time
families.

May import `gpuglass` and the records of `exporters/engine_probe`."""
