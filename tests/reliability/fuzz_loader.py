"""Open damaged model folders, as many as there is time for: `python -m tests.reliability.fuzz_loader --inputs 20000`.

With atheris (`pip install atheris`), which follows the code that each input reaches, it goes on until it is stopped:
`python -m tests.reliability.fuzz_loader --atheris -max_total_time=3600`. Without, the damage is drawn from a seed.
What is wrong is any exception but a TransectError, a message too long for a line, and memory out of proportion.
"""

from __future__ import annotations

import argparse
import collections
import gc
import sys
import tempfile
import traceback
import warnings
from pathlib import Path
from random import Random
from types import FunctionType

import transformers

from .damage import attempt, copied, damage, good_folders


class FromBytes(Random):
    """Draws from the bytes that a fuzzer gives, and zeros when they are used up."""

    def __init__(self, data: bytes) -> None:
        super().__init__(0)
        self.data, self.place = data, 0

    def getrandbits(self, k: int) -> int:
        size = -(-k // 8)
        piece = self.data[self.place : self.place + size]
        self.place += size
        return int.from_bytes(piece.ljust(size, b"\0"), "little") & ((1 << k) - 1)

    def random(self) -> float:
        return self.getrandbits(53) / 2**53


def one(folders: list[Path], place: Path, random: Random) -> str | None:
    """Damage a copy once or twice, and open it; what `attempt` gives."""
    folder = copied(random.choice(folders), place)
    for _ in range(random.randrange(1, 3)):
        damage(folder, random)
    return attempt(folder)


def loading() -> list[FunctionType]:
    """The functions that atheris follows: Transect's own, which opening a folder may reach, not all of torch's."""
    rooms = ("checkpoint", "anatomy", "operators", "parts", "store")
    starts = tuple(f"transect.{room}." for room in rooms)
    found = [one for one in gc.get_objects() if isinstance(one, FunctionType)]
    return [one for one in found if str(one.__module__).startswith(starts)]


def main() -> None:
    """Print how many were tried, refused and opened, and every failure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--atheris", action="store_true")
    options, more = parser.parse_known_args()
    if more and not options.atheris:  # atheris has options of its own
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as root:
        folders, place = good_folders(Path(root)), Path(root) / "damaged"
        if options.atheris:
            import atheris  # pyright: ignore[reportMissingImports]

            for function in loading():
                atheris.instrument_func(function)
            atheris.Setup([sys.argv[0], "-len_control=0", *more], lambda data: one(folders, place, FromBytes(data)))
            atheris.Fuzz()
        found = collections.Counter[str]()
        for number in range(options.seed, options.seed + options.inputs):
            try:
                error = one(folders, place, Random(number))
                found["opened" if error is None else "refused"] += 1
            except Exception:
                found["failed"] += 1
                print(f"--- input {number}")
                traceback.print_exc(limit=-4)
        print(f"{options.inputs} tried: {dict(found)}")
        sys.exit(1 if found["failed"] else 0)


if __name__ == "__main__":
    main()
