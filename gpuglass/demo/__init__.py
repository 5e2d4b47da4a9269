"""The demo: a simulated GPU host for trying dashboards and alerts without a GPU."""
