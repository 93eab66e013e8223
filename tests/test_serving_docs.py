"""The dashboard, the alert rules and the guide say what the code does and exposes."""

from __future__ import annotations

import ast
import json
import re
import subprocess
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml
from prometheus_client import Counter, Gauge, Histogram
from promql_parser import AggModifierType, AggregateExpr, Expr, VectorSelector

from qsun.cli.serve import command
from qsun.config import ServeConfig
from qsun.environments import serving_python
from qsun.errors import QsunError
from qsun.export.containers import VLLM_IMAGE
from qsun.policy import Policy
from qsun.serve.metrics import Metrics
from qsun.serve.pool import Pool

DOCS = Path(__file__).parent.parent / "docs"
DASHBOARD, ALERTS = DOCS / "serving/grafana.json", DOCS / "serving/alerts.yaml"
# What Prometheus adds to what it scrapes, and what vLLM's metrics have.
SCRAPED, OF_VLLM = {"job", "instance"}, {"model_name", "engine", "source", "reason"}
# What Grafana puts in place of its variables, wherever a duration is wanted.
DURATIONS = {"$__rate_interval": "5m", "$__range": "1h"}
VLLM_NAMES = """
import importlib.util, json, pathlib, re
(place,) = importlib.util.find_spec("vllm").submodule_search_locations
files = pathlib.Path(place).rglob("*.py")
texts = (path.read_text(encoding="utf-8") for path in files)
print(json.dumps(sorted({name for text in texts for name in re.findall(r'"(vllm:\\w+)"', text)})))
"""
Document = dict[str, Any]


@pytest.fixture(scope="module")
def dashboard() -> Document:
    loaded: Document = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    return loaded


@pytest.fixture(scope="module")
def rules() -> list[Document]:
    loaded = yaml.safe_load(ALERTS.read_text(encoding="utf-8"))
    return [rule for group in loaded["groups"] for rule in group["rules"]]


@pytest.fixture(scope="module")
def exposed() -> dict[str, set[str]]:
    """The labels of every series that a router exposes, by its name."""
    metrics, found = Metrics(Pool()), {}
    parts = [*vars(metrics).values(), *metrics.by_worker.values()]
    for part in parts:
        if not isinstance(part, Counter | Gauge | Histogram):
            continue
        (family,) = part.describe()
        labels = set(part._labelnames)
        for ending in {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}.get(
            family.type, [""]
        ):
            found[family.name + ending] = labels | ({"le"} if ending == "_bucket" else set())
    # All of them, by what the registry itself says.
    assert {family.name for family in metrics.registry.collect()} == {
        re.sub("_(total|bucket|sum|count)$", "", name) for name in found
    }
    return found


def panels(dashboard: Document) -> list[Document]:
    """All panels but the rows' titles."""
    return [one for one in dashboard["panels"] if one["type"] != "row"]


def expressions(dashboard: Document, rules: list[Document]) -> Iterator[tuple[str, str]]:
    """Every expression of both files, with where it stands."""
    for panel in panels(dashboard):
        yield from ((panel["title"], target["expr"]) for target in panel["targets"])
    yield from ((rule["alert"], rule["expr"]) for rule in rules)


def parsed(expression: str) -> Expr:
    for variable, duration in DURATIONS.items():
        expression = expression.replace(variable, duration)
    return promql_parser.parse(expression)


def selectors(expression: Expr) -> list[VectorSelector]:
    """Everything that an expression reads."""
    found: list[VectorSelector] = []

    def visit(node: Expr) -> None:
        if isinstance(node, VectorSelector):
            found.append(node)

    promql_parser.walk(expression, visit)
    return found


def groupings(expression: Expr) -> list[tuple[set[str], set[str]]]:
    """The labels that each aggregation keeps, and the metrics that it is over."""
    found: list[tuple[set[str], set[str]]] = []

    def visit(node: Expr) -> None:
        if isinstance(node, AggregateExpr) and node.modifier is not None:
            assert node.modifier.type == AggModifierType.By
            names = {str(one.name) for one in selectors(node.expr)}
            found.append((set(node.modifier.labels), names))

    promql_parser.walk(expression, visit)
    return found


def test_every_expression_parses_and_reads_something(
    dashboard: Document, rules: list[Document]
) -> None:
    for place, expression in expressions(dashboard, rules):
        assert selectors(parsed(expression)), place


@pytest.mark.parametrize(
    "broken", ["sum(rate(x_total[5m])", "x{job=}", "rate(x_total)", "sum by x"]
)
def test_a_broken_expression_is_found(broken: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parsed(broken)


def test_the_routers_metrics_and_their_labels_exist(
    dashboard: Document, rules: list[Document], exposed: dict[str, set[str]]
) -> None:
    asked = set()
    for place, expression in expressions(dashboard, rules):
        tree = parsed(expression)
        for one in selectors(tree):
            if str(one.name).startswith("qsun_"):
                asked.add(str(one.name))
                labels = {matcher.name for matcher in one.matchers.matchers}
                assert labels <= exposed[str(one.name)] | SCRAPED, place
        for kept, names in groupings(tree):
            for name in names & exposed.keys():
                assert kept <= exposed[name] | SCRAPED, place
    families = {re.sub("_(total|bucket|sum|count)$", "", name) for name in exposed}
    shown = {re.sub("_(total|bucket|sum|count)$", "", name) for name in asked}
    assert shown == families, "every metric of the router is shown or watched"


def test_no_text_names_a_metric_that_does_not_exist(exposed: dict[str, set[str]]) -> None:
    """In descriptions and variables, which no parser sees."""
    for path in (DASHBOARD, ALERTS):
        named = set(re.findall(r"\bqsun_\w+", path.read_text(encoding="utf-8")))
        assert named <= exposed.keys(), path.name


def test_workers_metrics_are_vllms(dashboard: Document, rules: list[Document]) -> None:
    answer = subprocess.run(
        [serving_python(None), "-c", VLLM_NAMES],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    known = set(json.loads(answer.stdout))
    found = {
        str(one.name): {matcher.name for matcher in one.matchers.matchers}
        for _, expression in expressions(dashboard, rules)
        for one in selectors(parsed(expression))
        if str(one.name).startswith("vllm:")
    }
    assert found
    for name, labels in found.items():
        assert re.sub("_(total|bucket|sum|count)$", "", name) in known
        assert labels <= OF_VLLM | SCRAPED


def test_every_alert_says_what_how_long_and_how_bad(rules: list[Document]) -> None:
    names = [rule["alert"] for rule in rules]
    assert len(set(names)) == len(names)
    for rule in rules:
        assert re.fullmatch(r"[1-9]\d*m", rule["for"])
        assert rule["labels"] == {"severity": rule["labels"]["severity"]}
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert all(rule["annotations"][one].strip() for one in ("summary", "description"))
        assert rule["annotations"].keys() == {"summary", "description"}


def test_alerts_name_labels_that_are_left(
    rules: list[Document], exposed: dict[str, set[str]]
) -> None:
    for rule in rules:
        named = set(re.findall(r"\$labels\.(\w+)", json.dumps(rule["annotations"])))
        tree = parsed(rule["expr"])
        groups = groupings(tree)
        # Without an aggregation, all labels of the metrics are left.
        left = [kept for kept, _ in groups] or [
            exposed[str(one.name)] | SCRAPED for one in selectors(tree)
        ]
        assert all(named <= kept for kept in left), rule["alert"]


def test_the_dashboard_is_grafanas_and_for_any_data_source(dashboard: Document) -> None:
    # The last version of the model that every Grafana takes at import.
    assert dashboard["schemaVersion"] == 42
    assert dashboard["id"] is None
    assert dashboard["uid"]
    variables = {one["name"]: one for one in dashboard["templating"]["list"]}
    assert (variables["datasource"]["type"], variables["datasource"]["query"]) == (
        "datasource",
        "prometheus",
    )
    source = {"type": "prometheus", "uid": "${datasource}"}
    for panel in panels(dashboard):
        assert panel["datasource"] == source
        assert [target["datasource"] for target in panel["targets"]] == [source] * len(
            panel["targets"]
        )
    for one in variables.values():
        if one["type"] == "query":
            assert one["datasource"] == source
            assert one["query"]["query"].startswith("label_values(")
    used = set(re.findall(r"\$(?!__)\{?(\w+)", DASHBOARD.read_text(encoding="utf-8")))
    assert used == variables.keys()


def test_variables_list_labels_that_exist(
    dashboard: Document, exposed: dict[str, set[str]]
) -> None:
    for one in dashboard["templating"]["list"]:
        if one["type"] != "query":
            continue
        found = re.fullmatch(r"label_values\((.+), (\w+)\)", one["query"]["query"])
        assert found is not None
        (selector,) = selectors(parsed(found[1]))
        labels = {matcher.name for matcher in selector.matchers.matchers}
        assert labels | {found[2]} <= exposed[str(selector.name)] | SCRAPED


def test_panels_have_ids_units_and_room_of_their_own(dashboard: Document) -> None:
    ids = [one["id"] for one in dashboard["panels"]]
    assert len(set(ids)) == len(ids)
    titles = [one["title"] for one in dashboard["panels"]]
    assert len(set(titles)) == len(titles)
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells
    for panel in panels(dashboard):
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        letters = [target["refId"] for target in panel["targets"]]
        assert len(set(letters)) == len(letters)


def test_legends_name_labels_that_are_left(
    dashboard: Document, exposed: dict[str, set[str]]
) -> None:
    for panel in panels(dashboard):
        for target in panel["targets"]:
            named = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            tree = parsed(target["expr"])
            groups = groupings(tree)
            left = [kept for kept, _ in groups] or [
                exposed.get(str(one.name), set()) | SCRAPED for one in selectors(tree)
            ]
            assert all(named <= kept for kept in left), panel["title"]


def tables(text: str) -> list[list[list[str]]]:
    """Every table's rows, its head left out, a cell's code marks too."""
    found: list[list[list[str]]] = []
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        rows = [line.strip("|").split("|") for line in block.splitlines()[2:]]
        found.append([[cell.strip() for cell in row] for row in rows])
    return found


@pytest.fixture(scope="module")
def guide() -> str:
    return (DOCS / "serving.md").read_text(encoding="utf-8")


def table_with(guide: str, first: str) -> list[list[str]]:
    (found,) = (rows for rows in tables(guide) if rows[0][0] == first)
    return found


def test_the_guide_has_every_setting_and_its_default(guide: str) -> None:
    rows = table_with(guide, "`policy`")
    assert {row[0].strip("`"): row[1] for row in rows} == {
        name: str(value) for name, value in asdict(ServeConfig()).items()
    }


def test_the_guide_has_every_option(guide: str) -> None:
    rows = table_with(guide, "`--decode`")
    told = [name for row in rows for name in re.findall(r"--[\w-]+", row[0])]
    assert sorted(told) == sorted(
        option for parameter in command.params for option in parameter.opts if "--" in option
    )


def test_the_guide_has_every_policy(guide: str) -> None:
    assert [row[0].strip("`") for row in table_with(guide, "`shared`")] == [
        policy.value for policy in Policy
    ]


def test_the_guide_has_every_metric_and_its_labels(
    guide: str, exposed: dict[str, set[str]]
) -> None:
    told: dict[str, set[str]] = {}
    for names, labels in table_with(guide, "`qsun_requests_total`"):
        for name in re.findall(r"qsun_\w+", names):
            told[name] = set(re.findall(r"`(\w+)`", labels))
    assert told == {
        name.removesuffix("_bucket"): labels - {"le"}
        for name, labels in exposed.items()
        if not name.endswith(("_sum", "_count"))
    }


def literal_codes(tree: ast.Module) -> Iterator[str]:
    """The codes of the refusals that a module makes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            place = {"Refusal": 1, "bad_request": 0}.get(node.func.id)
            argument = None if place is None else node.args[place]
            if isinstance(argument, ast.Constant):
                yield str(argument.value)


def test_the_guide_has_every_code_of_an_error(guide: str) -> None:
    told = {code for row in table_with(guide, "400") for code in re.findall(r"`(\w+)`", row[1])}
    sources = (DOCS.parent / "qsun/serve").glob("*.py")
    assert told == {
        code
        for path in sources
        for code in literal_codes(ast.parse(path.read_text(encoding="utf-8")))
    }


def test_the_guide_names_what_is_served_and_exists(guide: str) -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", guide):
        assert (DOCS / link).is_file(), link
    for anchor in re.findall(r"\]\(#([^)]+)\)", guide):
        assert f"\n## {anchor}\n" in guide.lower()
    assert VLLM_IMAGE in guide
    assert {int(row[0]) for row in table_with(guide, "0")} - {0, 2} <= {
        kind.exit_code for kind in QsunError.__subclasses__()
    }
