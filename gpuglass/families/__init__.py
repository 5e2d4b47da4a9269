"""Declarations of metric families, one module per exporter; `gpuglass.catalog` collects them."""
