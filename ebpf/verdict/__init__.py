"""Verdicts on CUDA memory, made in the unprivileged agent from what the tracer sends: which process leaks,
and which request ran when an allocation failed.

`floors` keeps a bounded history of one process's live bytes, `trend` judges the shape of a stretch of it,
`leak` makes a verdict over time, `process` does so for each kind of memory of a process, `steps` and
`events` join allocations with the steps that ran then. All of that is pure: time and records come in,
nothing is read. `part` stands at the edge: it listens to the record stream and publishes.
"""
