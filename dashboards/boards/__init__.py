"""The dashboards, one module each: what is asked of Prometheus, and how it is shown."""
