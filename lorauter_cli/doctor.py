"""`lorauter doctor`. Parses arguments and shows findings; `deployments.doctor` has them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from lorauter_cli.console import notify
from lorauter_cli.service import CONFIG_HELP, make_importable, shipped_config

_COLOURS = {"ok": "green", "warning": "yellow", "wrong": "red"}


def doctor(
    config: Annotated[Path | None, typer.Option(help=CONFIG_HELP)] = None,
    host: Annotated[str | None, typer.Option(help="In place of the configuration's.")] = None,
    port: Annotated[int | None, typer.Option(help="In place of the configuration's.", min=1, max=65535)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say what is wrong with this machine, or with what the configuration names; starts nothing.

    Each store is read, and, where that is allowed, a throw-away object is written there and deleted. The exit status is
    1 if anything is wrong; warnings leave it 0.
    """
    make_importable()
    from deployments.doctor import examine

    findings = []
    for finding in examine(config or shipped_config(), host=host, port=port, notify=notify):
        findings.append(finding)
        if not as_json:
            status = typer.style(f"{finding.status:8}", fg=_COLOURS[finding.status])
            typer.echo(f"{status}{finding.check}: {finding.message}")
    wrong = sum(finding.status == "wrong" for finding in findings)
    if as_json:
        typer.echo(json.dumps({"ok": not wrong, "findings": [asdict(finding) for finding in findings]}, indent=1))
    else:
        warned = sum(finding.status == "warning" for finding in findings)
        notify(f"{len(findings)} checks: {wrong} wrong, {warned} warnings")
    if wrong:
        raise typer.Exit(1)
