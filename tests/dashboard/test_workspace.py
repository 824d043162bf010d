import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.dashboard.samples import all_names, forget_login
from tide_mega.errors import DashboardError
from tide_mega.lab.dashboard.layout import SECTIONS

door = pytest.importorskip("tide_mega.lab.dashboard.workspace", reason="needs wandb-workspaces")


def sections(text: str) -> list[dict[str, Any]]:
    return json.loads(text)["spec"]["section"]["panelBankConfig"]["sections"]


def test_the_workspace_has_the_layouts_sections_and_panels() -> None:
    made = sections(door.workspace_json(door.build_workspace("team", "project", "TIDE")))
    assert [section["name"] for section in made] == [section.title for section in SECTIONS]
    assert made[0]["name"] == "Loss by frequency"
    for section, wanted in zip(made, SECTIONS, strict=True):
        assert section["isOpen"]
        configs = [panel["config"] for panel in section["panels"]]
        assert [config["chartTitle"] for config in configs] == [panel.title for panel in wanted.panels]
        for config, panel in zip(configs, wanted.panels, strict=True):
            assert config["xAxis"] == "tokens" and config["yAxisTitle"] == panel.unit
            assert config["metrics"] == list(panel.lines)
            assert config.get("metricRegex", "") == panel.pattern
            assert config.get("useMetricRegex", False) == bool(panel.pattern)


def test_the_metrics_of_a_run_split_panels_by_text() -> None:
    made = sections(door.workspace_json(door.build_workspace("team", "p", "TIDE", all_names())))
    by_title = {panel["config"]["chartTitle"]: panel["config"] for panel in made[0]["panels"]}
    assert by_title["Loss by decile on text: pubmed"]["metrics"] == [
        f"loss_by_decile_pubmed/{decile}" for decile in range(10)
    ]
    assert "Loss by decile on text: wikitext-2" in by_title
    assert "Loss by decile on text" not in by_title


class Server:
    """As much of W&B's API as saving a workspace meets."""

    def __init__(self) -> None:
        self.views: dict[str, dict[str, Any]] = {}
        self.project: str | None = "tide_mega"
        self.refuses = False
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                try:
                    asked = json.loads(body)
                    answer = server.answer(asked["query"], asked.get("variables") or {})
                except (ValueError, KeyError, TypeError):
                    answer = {}
                sent = json.dumps(answer).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(sent)))
                self.end_headers()
                self.wfile.write(sent)

            def log_message(self, *args: object) -> None:
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def answer(self, query: str, given: dict[str, Any]) -> dict[str, Any]:
        if "upsertView" in query:
            if self.refuses:
                return {"errors": [{"message": "permission denied"}], "data": None}
            view = {"id": given.get("id", f"id{len(self.views)}"), "name": given["name"]}
            self.views[given["name"]] = view | {"displayName": given["displayName"], "spec": given["spec"]}
            return {"data": {"upsertView": {"view": view, "inserted": "id" not in given}}}
        if "allViews" in query:
            if given["name"] != self.project:
                return {"data": {"project": None}}
            found = self.views.get(given["viewName"])
            return {"data": {"project": {"allViews": {"edges": [{"node": found}] if found else []}}}}
        viewer = {
            "id": "u",
            "entity": "team",
            "username": "u",
            "email": "",
            "flags": "{}",
            "teams": {"edges": []},
        }
        return {"data": {"viewer": viewer}}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    forget_login(monkeypatch, tmp_path)
    made = Server()
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{made.http.server_port}")
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    yield made
    made.http.shutdown()
    made.http.server_close()


def test_a_workspace_is_created_then_replaced_under_its_name(server: Server) -> None:
    address = door.save_workspace(door.build_workspace("team", "tide_mega", "TIDE"))
    again = door.save_workspace(door.build_workspace("team", "tide_mega", "TIDE", all_names()))
    assert address == again and "/team/tide_mega?nw=" in address
    (view,) = server.views.values()
    assert view["id"] == "id0" and view["displayName"] == "TIDE"
    assert "Loss by decile on text: pubmed" in view["spec"]
    other = door.save_workspace(door.build_workspace("team", "tide_mega", "TIDE 2"))
    assert other != address and len(server.views) == 2


def test_the_login_names_the_entity(server: Server) -> None:
    assert door.default_entity() == "team"


def test_a_project_that_is_not_there_is_named(server: Server) -> None:
    server.project = None
    with pytest.raises(DashboardError, match="no project team/tide_mega"):
        door.save_workspace(door.build_workspace("team", "tide_mega", "TIDE"))


def test_a_refusal_is_one_sentence(server: Server) -> None:
    server.refuses = True
    with pytest.raises(DashboardError, match="did not save the workspace in team/tide_mega"):
        door.save_workspace(door.build_workspace("team", "tide_mega", "TIDE"))
