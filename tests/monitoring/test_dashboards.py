from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from ops.generators import dashboards
from ops.monitoring.declared import declared, of_every_process
from ops.monitoring.promql import Catalogue
from ops.monitoring.queries import (
    ALL,
    pages,
    panel_queries,
    rate_interval_s,
    regex_of,
    substituted,
    variable_queries,
)
from ops.monitoring.rules import rules
from tests.monitoring.promtool import promtool

PAGES = pages()
GRID = 24


@pytest.fixture(scope="module")
def catalogue() -> Catalogue:
    return Catalogue.of((*declared(), *of_every_process()))


def plain(expr: str) -> str:
    return substituted(expr, {"namespace": ALL, "model": ALL, "replica": ALL, "__rate_interval": "60s"})


def panels_of(name: str) -> list[dict]:
    return [panel for panel in PAGES[name]["panels"] if panel["type"] != "row"]


def test_there_are_four() -> None:
    assert sorted(PAGES) == ["engine", "overview", "ranks", "router"]


def test_the_same_input_makes_the_same_text() -> None:
    assert dashboards.files() == dashboards.files()


def test_every_query_names_what_is_exported(catalogue: Catalogue) -> None:
    for query in panel_queries():
        labels = catalogue.check(plain(query.expr))
        shown = set(re.findall(r"\{\{(\w+)\}\}", query.legend))
        assert shown <= labels, query.title


def test_legends_tell_series_apart(catalogue: Catalogue) -> None:
    """A label that an answer still has and no legend shows makes two lines with one name."""
    for query in panel_queries():
        labels = catalogue.check(plain(query.expr)) - {"job", "namespace", "generation", "model"}
        hidden = labels - set(re.findall(r"\{\{(\w+)\}\}", query.legend))
        assert hidden == set() or query.legend == "{{instance}}", query.title


def test_every_metric_of_ours_is_looked_at_somewhere(catalogue: Catalogue) -> None:
    seen = {name for query in panel_queries() for name in catalogue.names(plain(query.expr))}
    unseen = [metric.name for metric in declared() if not seen & set(metric.series_names)]
    assert unseen == []


def test_promtool_takes_every_query(tmp_path: Path) -> None:
    rules = [{"record": f"q{i}", "expr": plain(query.expr)} for i, query in enumerate(panel_queries())]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}))
    done = promtool("check", "rules", tmp_path / "rules.yaml")
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_new_process_at_the_address_of_a_dead_one_breaks_no_query(tmp_path: Path, catalogue: Catalogue) -> None:
    """Prometheus keeps what the dead one said, under labels of its own, for as long as a rate looks back."""
    joins = [plain(query.expr) for query in panel_queries() if "group_left" in query.expr]
    joins += [rule.expr for rule in rules() if "group_left (model, replica)" in rule.expr]
    names = {name for expr in joins for name in catalogue.names(expr)}
    series = []
    for replica, values in (("m/0", "1+1x4 stale"), ("m/1", "_x4 1+1x40")):
        target = f'job="ranks", instance="a:1", namespace="n", model="m", replica="{replica}", rank="0"'
        for name in sorted(names):
            edges = [', le="1"', ', le="+Inf"'] if name.endswith("_bucket") else [""]
            series += [{"series": f'{name}{{{target}, kind="decode"{edge}}}', "values": values} for edge in edges]
    asked = [
        {"expr": f"count({expr}) >= bool 1", "eval_time": "75s", "exp_samples": [{"labels": "{}", "value": 1}]}
        for expr in joins
    ]
    told = {
        "evaluation_interval": "15s",
        "tests": [{"interval": "15s", "input_series": series, "promql_expr_test": asked}],
    }
    (tmp_path / "test.yaml").write_text(yaml.safe_dump(told))
    done = promtool("test", "rules", tmp_path / "test.yaml")
    assert len(joins) > 10
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", sorted(PAGES))
class TestEveryDashboard:
    def test_ids_differ(self, name: str) -> None:
        ids = [panel["id"] for panel in PAGES[name]["panels"]]
        assert len(ids) == len(set(ids))

    def test_every_panel_asks_and_explains(self, name: str) -> None:
        for panel in panels_of(name):
            assert panel["targets"], panel["title"]
            assert panel["title"]
            assert panel["description"].endswith((".", "per token.")), panel["title"]
            assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
            ids = [target["refId"] for target in panel["targets"]]
            assert len(ids) == len(set(ids))

    def test_panels_fit_the_grid_and_do_not_overlap(self, name: str) -> None:
        taken: set[tuple[int, int]] = set()
        for panel in PAGES[name]["panels"]:
            place = panel["gridPos"]
            assert place["x"] + place["w"] <= GRID
            cells = {
                (x, y)
                for x in range(place["x"], place["x"] + place["w"])
                for y in range(place["y"], place["y"] + place["h"])
            }
            assert not cells & taken, panel["title"]
            taken |= cells

    def test_only_its_own_variables_are_used(self, name: str) -> None:
        page = PAGES[name]
        assert page["templating"]["list"][0]["type"] == "datasource"
        known = {variable["name"] for variable in page["templating"]["list"]} | {"__rate_interval"}
        text = json.dumps(page["panels"]) + "".join(variable_queries(page).values())
        assert set(re.findall(r"\$\{?(\w+)", text)) <= known

    def test_every_panel_asks_the_chosen_data_source(self, name: str) -> None:
        sources = {target["datasource"]["uid"] for panel in panels_of(name) for target in panel["targets"]}
        assert sources == {"${datasource}"}


def test_variables_are_written_as_grafana_writes_them() -> None:
    assert substituted(
        'a{m=~"$model"}[$__rate_interval] ${x:regex}', {"model": "b", "__rate_interval": "4s", "x": "y"}
    ) == ('a{m=~"b"}[4s] y')
    with pytest.raises(KeyError):
        substituted("$nobody", {})
    assert regex_of(("demo",)) == "demo"
    assert regex_of(("a.b/0", "c")) == r"(a\\.b/0|c)"
    assert (rate_interval_s(1, 1), rate_interval_s(15, 1), rate_interval_s(60, 30)) == (4, 16, 120)
