"""Scores, leak and recurrence detectors and forecasts from the series in Prometheus. May import
`gpuglass`."""
