"""`transect catalogue`: a page for everything that there is."""

from __future__ import annotations

from pathlib import Path

import click

from ..group import main_group
from ..options import Place
from ..printing import print_whole


@main_group.command()
@click.option("--out", type=Place(), required=True, help="Folder for the site.")
@click.option("--records", type=Place(), help="Folder of recorded verdicts (claims --record), shown too.")
def catalogue(out: Path, records: Path | None) -> None:
    """Write a site with a page for every method: what it does, its parameters, and what was measured of its claims."""
    from ...verbs import catalogue as write

    print_whole(f"the catalogue: {write(out, records=records)}")
