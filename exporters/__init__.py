"""Exporters: parts of the agent that turn what the node and the engines know into metric families."""
