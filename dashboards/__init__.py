"""Writes the Grafana dashboards in `generated/`. May import `gpuglass`."""
