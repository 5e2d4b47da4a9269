"""What the tests of several rooms share: requirements, tool builds, time budgets, a real Prometheus."""
