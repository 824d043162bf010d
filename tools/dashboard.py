"""Creates or updates the W&B dashboard of a project: a saved workspace, loss by frequency first.

    python tools/dashboard.py entity=my-team project=tide_mega
    python tools/dashboard.py entity=my-team run=runs/demo
    python tools/dashboard.py json=dashboard.json

A repeated run replaces the workspace of the same name, including changes made to it by hand. Metrics whose number
depends on the model are matched by regular expressions, so one dashboard serves every run of the project; with
`run` each evaluation text of that run gets a panel of its own. Saving needs a W&B login (`wandb login`, or
WANDB_API_KEY); `json=path` and `dry_run=true` need none. tools/plot_run.py draws the same panels without W&B.
"""

from dataclasses import dataclass
from pathlib import Path

from tide_mega.config.command_line import status_of, tool_entry
from tide_mega.config.hydra_door import parse_tool_cli
from tide_mega.errors import ConfigError, DashboardError
from tide_mega.files import write_bytes
from tide_mega.lab.dashboard.read import read_run
from tide_mega.training.loggers import has_login


@dataclass
class Options:
    """Where the workspace goes."""

    entity: str | None = None
    """W&B user or team; null takes the login's default."""
    project: str = "tide_mega"
    """W&B project, as in logging.wandb_project."""
    name: str = "TIDE"
    """Name of the workspace in W&B."""
    run: str | None = None
    """A run folder, offline W&B run or .wandb file, whose metrics give the panels that are made for each value."""
    json: str | None = None
    """File to write the workspace to, instead of saving it in W&B."""
    dry_run: bool = False
    """Print the workspace as JSON instead of saving it."""


def create(options: Options) -> None:
    """Save the workspace to W&B, or write it to a file or standard output.

    Raises:
        ConfigError: there is no login, or the library is missing.
        DashboardError: the run cannot be read, or W&B refuses.
    """
    try:
        from tide_mega.lab.dashboard import workspace as door
    except ModuleNotFoundError as error:
        if error.name and error.name.split(".")[0] == "wandb_workspaces":
            raise ConfigError(
                "wandb-workspaces is not installed: pip install 'tide_mega[dashboard]', which the dashboard needs."
            ) from error
        raise
    names = read_run(options.run).names() if options.run else []
    writes = options.dry_run or options.json is not None
    if not writes and not has_login():
        raise ConfigError(
            "there is no W&B login on this machine: run `wandb login` or set WANDB_API_KEY, or write the "
            "workspace to a file with json=dashboard.json."
        )
    entity = options.entity or ("" if writes else door.default_entity())
    workspace = door.build_workspace(entity, options.project, options.name, names)
    if options.json is not None:
        write_bytes(Path(options.json), (door.workspace_json(workspace) + "\n").encode())
        print(f"wrote {options.json}, nothing saved in W&B")
    elif options.dry_run:
        print(door.workspace_json(workspace))
    else:
        print(f"saved {door.save_workspace(workspace)}")


def main(argv: list[str] | None = None) -> int:
    """Run the tool; return its exit status: 0, 1 for a run or W&B that cannot be used, 2 for a bad option."""
    options = parse_tool_cli(Options, argv, doc=__doc__ or "")
    return status_of(lambda: create(options), DashboardError)


if __name__ == "__main__":
    tool_entry(main)
