"""Writes the Grafana dashboards in `generated/`, checks them, and draws previews of them from live data.

In: the catalog, the recording rules and the alerts, whose names the queries refer to. Out: classic
dashboard JSON (schema version 39), which Grafana 10.4 and later imports, provisions and reads from
ConfigMaps.
"""
