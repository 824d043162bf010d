"""The only module that imports wandb-workspaces: the layout as a saved workspace of a W&B project."""

import hashlib
import io
from collections.abc import Iterable
from contextlib import redirect_stderr
from typing import Any

import wandb
import wandb_workspaces.reports.v2 as reports
import wandb_workspaces.workspaces as workspaces
from wandb_workspaces.workspaces import internal

from tide_mega.errors import DashboardError
from tide_mega.lab.dashboard.layout import SECTIONS
from tide_mega.lab.dashboard.panel import Panel, charts

_ALNUM = "0123456789abcdefghijklmnopqrstuvwxyz"


def build_workspace(entity: str, project: str, name: str, names: Iterable[str] = ()) -> Any:
    """Build the workspace without saving it.

    Args:
        entity: user or team.
        project: W&B project.
        name: shown in W&B; a workspace of the same name is replaced when this one is saved.
        names: metrics of a run. Split panels get a panel for each of their values in it; without `names`, one
            panel with all of them.
    """
    known = list(names)
    return workspaces.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=[
            workspaces.Section(
                name=section.title,
                panels=[plot for panel in section.panels for plot in _line_plots(panel, known)],
                is_open=True,
                layout_settings=workspaces.SectionLayoutSettings(columns=3, rows=2),
                panel_settings=workspaces.SectionPanelSettings(x_axis="tokens"),
            )
            for section in SECTIONS
        ],
        settings=workspaces.WorkspaceSettings(x_axis="tokens"),
    )


def _line_plots(panel: Panel, known: list[str]) -> list[Any]:
    split = charts(panel, known) if panel.split else []
    if split:
        return [_line_plot(panel, chart.title, {"y": list(chart.lines)}) for chart in split]
    shown = {"y": list(panel.lines)} if panel.lines else {"metric_regex": panel.pattern}
    return [_line_plot(panel, panel.title, shown)]


def _line_plot(panel: Panel, title: str, shown: dict[str, Any]) -> Any:
    return reports.LinePlot(
        title=title,
        x="tokens",
        title_x="training tokens",
        title_y=panel.unit,
        log_y=panel.log_y or None,
        **shown,
    )


def workspace_json(workspace: Any) -> str:
    """Return the workspace as W&B stores it; needs no login. (The library has no public API for this.)"""
    return str(workspace._to_model().model_dump_json(by_alias=True, exclude_none=True, indent=2))


def save_workspace(workspace: Any) -> str:
    """Create the workspace, or replace the one saved under its name; return its URL.

    Raises:
        DashboardError: W&B cannot be reached, or refuses.
    """
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            workspace._internal_name = _view_name(workspace.name)
            workspace._internal_id = _saved_id(workspace)
            workspace.save()
    except DashboardError:
        raise
    except Exception as error:
        raise DashboardError(
            f"W&B did not save the workspace in {workspace.entity}/{workspace.project} ({error}): check entity, "
            "project and login, or write json=dashboard.json."
        ) from error
    return str(workspace.url)


def default_entity() -> str:
    """Return the entity of the logged-in user.

    Raises:
        DashboardError: W&B cannot be reached, or names none.
    """
    try:
        found = wandb.Api().default_entity
    except Exception as error:
        raise DashboardError(
            f"W&B cannot be reached ({error}): try again, or write json=dashboard.json."
        ) from error
    if not found:
        raise DashboardError("W&B names no default entity: give entity=<user or team>.")
    return str(found)


def _view_name(name: str) -> str:
    """Return W&B's internal name of the workspace, determined by its name, so that it is found again."""
    number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    letters = ""
    for _ in range(11):
        number, digit = divmod(number, len(_ALNUM))
        letters += _ALNUM[digit]
    return f"nw-{letters}-v"


def _saved_id(workspace: Any) -> str:
    """Return the id of the saved workspace; empty if there is none."""
    try:
        view = internal.get_view_dict(workspace.entity, workspace.project, workspace._internal_name[3:-2])
    except ValueError as error:
        if str(error).startswith("Workspace"):
            return ""
        raise DashboardError(
            f"W&B has no project {workspace.entity}/{workspace.project} that this login may see: train or "
            "synchronise a run first, or check entity and project."
        ) from error
    return str(view["id"])
