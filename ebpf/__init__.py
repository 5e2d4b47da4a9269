"""CUDA memory by eBPF: program, loaders, library discovery, allocation ledger, leak verdict.

May import `gpuglass` and the records of `exporters/engine_probe`."""
