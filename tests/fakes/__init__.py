"""Stand-ins for what the tests have no real one of: a GPU driver, a kubelet."""
