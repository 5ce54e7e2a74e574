"""`transect.catalogue`: a page for everything that is registered."""

from __future__ import annotations

from pathlib import Path

from ..arguments import checked
from ..claims.records import SHIPPED, records_in
from ..errors import TransectError
from ..pages import KIND, write_site
from ..store import Folder, alone
from .arguments import FolderName


@checked
def catalogue(out: FolderName, *, records: FolderName | None = None) -> Path:
    """Write the catalogue as a static site that needs no network; the path of its index.

    out: a folder for it; other files may lie in it and are left alone. records: a folder of recorded verdicts (see
    `check_claims`), shown beside those that come with the package; of each claim and model the newest.
    """
    if records is not None and not records.is_dir():
        raise TransectError(f"there is no folder {records} with recorded claims")
    found = [*records_in(SHIPPED), *(records_in(records) if records is not None else ())]
    folder = Folder(Path(out).expanduser(), KIND)
    folder.check_place(among_others=True)
    with alone(folder.path):
        folder.take(among_others=True)
        first, *_ = write_site(folder, found)
    return folder.path / first
