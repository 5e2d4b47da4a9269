"""Tests of the verdicts, in simulated time."""
