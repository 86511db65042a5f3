"""Make Grafana's dashboard: python docker/grafana/dashboard.py writes dashboards/perceiver.json.

`render.py` makes an image of the same panels, and a test asks a real Prometheus every query.
"""

import json
from itertools import count
from pathlib import Path
from typing import Any

import engine_panels
import request_panels
from panel import HERE, Panel, Query

Json = dict[str, Any]

TARGET = Path(__file__).parent / "dashboards" / "perceiver.json"
DATASOURCE: Json = {"type": "prometheus", "uid": "prometheus"}
COLUMNS = 24
ROWS = request_panels.ROWS + engine_panels.ROWS

GREEN, ORANGE, RED = "#009E73", "#E69F00", "#D55E00"  # Okabe and Ito's, which colour-blind readers can tell apart


def dashboard() -> Json:
    """Return the whole dashboard."""
    return {
        "uid": "perceiver",
        "title": "Perceiver service",
        "description": "Made by docker/grafana/dashboard.py; change it there.",
        "tags": ["perceiver"],
        "schemaVersion": 39,
        "version": 1,
        "editable": False,
        "graphTooltip": 1,
        "time": {"from": "now-1h", "to": "now"},
        "refresh": "10s",
        "templating": {"list": [instance_variable()]},
        "annotations": {"list": [version_changes(), alarms()]},
        "panels": panels(),
    }


def instance_variable() -> Json:
    """Return the choice of instances at the top; all of them at first."""
    return {
        "name": "instance",
        "label": "Instance",
        "type": "query",
        "datasource": DATASOURCE,
        "query": {"query": "label_values(perceiver_ready, instance)", "refId": "instance"},
        "definition": "label_values(perceiver_ready, instance)",
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }


def version_changes() -> Json:
    """Return the marks where another version, or the same in a new process, begins to serve."""
    live = f"max by (instance, name, version) (perceiver_model_info{{{HERE}}})"
    return annotation(
        "Version",
        f"{live} unless on (instance, name, version) perceiver_model_info{{{HERE}}} offset 1m",
        "{{name}} {{version}} serves on {{instance}}",
        GREEN,
    )


def alarms() -> Json:
    """Return the marks where an alarm goes off."""
    return annotation("Alarms", 'ALERTS{alertstate="firing", alertname=~"Perceiver.*"}', "{{alertname}}", RED)


def annotation(name: str, expr: str, title: str, colour: str) -> Json:
    """Return marks at the times at which a query gives something."""
    return {
        "name": name,
        "enable": True,
        "datasource": DATASOURCE,
        "expr": expr,
        "step": "10s",
        "titleFormat": title,
        "iconColor": colour,
    }


def panels() -> list[Json]:
    """Return rows and panels with their places, from the top left."""
    numbers, result, y = count(1), [], 0
    for row in ROWS:
        place = {"x": 0, "y": y, "w": COLUMNS, "h": 1}
        result.append(
            {"id": next(numbers), "type": "row", "title": row.title, "collapsed": False, "gridPos": place, "panels": []}
        )
        x, y = 0, y + 1
        for item in row.panels:
            if x + item.width > COLUMNS:
                x, y = 0, y + row.height
            place = {"x": x, "y": y, "w": item.width, "h": row.height}
            result.append({"id": next(numbers), "gridPos": place, **panel(item)})
            x += item.width
        y += row.height
    return result


def panel(item: Panel) -> Json:
    """Return one panel without its number and place."""
    defaults: Json = {"unit": item.unit, "color": {"mode": "palette-classic"}, "custom": custom(item)}
    if item.kind in ("stat", "state-timeline"):
        defaults["color"] = {"mode": "thresholds"}
    defaults["thresholds"] = thresholds(item)
    if item.words:
        words = {value: {"text": text, "color": RED if value == "0" else GREEN} for value, text in item.words}
        defaults["mappings"] = [{"type": "value", "options": words}]
    if item.kind == "timeseries" and item.unit != "sci":
        defaults["min"] = 0
    return {
        "type": item.kind,
        "title": item.title,
        "description": f"{item.shows}\n\n**Bad:** {item.bad}\n\n**Do:** {item.do}",
        "datasource": DATASOURCE,
        "targets": [target(query, item, chr(ord("A") + number)) for number, query in enumerate(item.queries)],
        "fieldConfig": {"defaults": defaults, "overrides": [dash(legend) for legend in item.dashed]},
        "options": options(item),
    }


def target(query: Query, item: Panel, name: str) -> Json:
    """Return one query of a panel."""
    return {
        "refId": name,
        "datasource": DATASOURCE,
        "expr": query.expr,
        "legendFormat": query.legend,
        "format": "heatmap" if item.kind == "heatmap" else "time_series",
        "range": item.kind != "stat",
        "instant": item.kind == "stat",
        "exemplar": query.exemplar,
    }


def thresholds(item: Panel) -> Json:
    """Return the colours by value; one colour where the panel has no thresholds."""
    steps: list[Json] = [{"color": GREEN, "value": None}]
    if item.thresholds is not None:
        warn, bad = item.thresholds
        steps += [{"color": ORANGE, "value": warn}] if warn < bad else []
        steps += [{"color": RED, "value": bad}]
    return {"mode": "absolute", "steps": steps}


def custom(item: Panel) -> Json:
    """Return how series are drawn."""
    if item.kind != "timeseries":
        return {"fillOpacity": 80} if item.kind == "state-timeline" else {}
    return {
        "drawStyle": "line",
        "lineWidth": 1,
        "fillOpacity": 30 if item.stacked else 8,
        "showPoints": "never",
        "spanNulls": False,
        "stacking": {"mode": "normal" if item.stacked else "none", "group": "A"},
        "thresholdsStyle": {"mode": "dashed" if item.thresholds else "off"},
    }


def dash(legend: str) -> Json:
    """Return the looks of a series that is a limit: dashed, grey, not stacked."""
    properties = {
        "custom.lineStyle": {"fill": "dash", "dash": [8, 8]},
        "custom.fillOpacity": 0,
        "custom.stacking": {"mode": "none"},
        "color": {"mode": "fixed", "fixedColor": "#8A8A8A"},
    }
    return {
        "matcher": {"id": "byName", "options": legend},
        "properties": [{"id": name, "value": value} for name, value in properties.items()],
    }


def options(item: Panel) -> Json:
    """Return the options of a panel's kind."""
    legend = {"showLegend": True, "displayMode": "list", "placement": "bottom"}
    tooltip = {"mode": "multi", "sort": "desc"}
    match item.kind:
        case "stat":
            return {
                "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
                "textMode": "name" if item.names else "value",
                "colorMode": "value",
                "graphMode": "none",
            }
        case "heatmap":
            return {
                "calculate": False,
                "cellGap": 1,
                "color": {"mode": "scheme", "scheme": "Oranges", "steps": 64, "exponent": 0.5, "fill": "dark-orange"},
                "yAxis": {"unit": item.unit, "axisPlacement": "left"},
                "cellValues": {"unit": "short", "decimals": 0},
                "filterValues": {"le": 1e-9},
                "tooltip": {"mode": "single", "yHistogram": True},
                "legend": {"show": True},
            }
        case "state-timeline":
            return {"mergeValues": True, "showValue": "never", "rowHeight": 0.7, "legend": legend, "tooltip": tooltip}
        case _:
            return {"legend": legend, "tooltip": tooltip}


def text() -> str:
    """Return the file's content."""
    return json.dumps(dashboard(), indent=2) + "\n"


if __name__ == "__main__":
    TARGET.write_text(text(), encoding="utf-8")
