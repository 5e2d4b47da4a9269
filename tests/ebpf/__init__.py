"""Tests of the CUDA memory tracer and its verdicts."""
