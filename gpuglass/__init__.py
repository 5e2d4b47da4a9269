"""The core that every part of GPUGlass shares: catalog, store, /metrics server, configuration, command line,
demo."""

__version__ = "0.1.0"
