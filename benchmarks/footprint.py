"""What a library costs before it does anything: seconds to import it, and megabytes to install it.

    python benchmarks/footprint.py romancy
    python benchmarks/footprint.py dbos
    python benchmarks/footprint.py edda-framework --module edda

Prints one JSON object. Import time is that of a fresh interpreter whose cache of compiled code is filled. The
size is that of all files that the installer put there for the distribution and for what it requires; extras
and compiled code are left out.
"""

import argparse
import importlib
import importlib.metadata
import json
import time
from pathlib import Path


def required(distribution: str) -> dict[str, importlib.metadata.Distribution]:
    """The distribution and all that it requires here, by normalised name."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    found: dict[str, importlib.metadata.Distribution] = {}
    seen: set[tuple[str, str]] = set()

    def add(name: str, extras: set[str]) -> None:
        key = canonicalize_name(name)
        wanted = [extra for extra in ("", *sorted(extras)) if (key, extra) not in seen]
        if not wanted:
            return
        seen.update((key, extra) for extra in wanted)
        found[key] = importlib.metadata.distribution(name)
        for text in found[key].requires or ():
            requirement = Requirement(text)
            if requirement.marker is None or any(requirement.marker.evaluate({"extra": e}) for e in wanted):
                add(requirement.name, requirement.extras)

    add(distribution, set())
    return found


def size_of(distribution: importlib.metadata.Distribution, module: str) -> int:
    """Bytes of its files; of an editable installation, those of its package."""
    files = [Path(str(file.locate())) for file in distribution.files or ()]
    if any(file.name.endswith(".pth") for file in files):
        source = importlib.import_module(module).__file__
        assert source is not None
        files += Path(source).parent.rglob("*")
    return sum(file.stat().st_size for file in set(files) if file.is_file() and file.suffix != ".pyc")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("distribution")
    parser.add_argument("--module", help="its name for import, where it differs")
    args = parser.parse_args()
    module = args.module or args.distribution
    started = time.perf_counter()
    imported = importlib.import_module(module)
    for name in getattr(imported, "__all__", ()):
        # Some packages import what they export when it is first asked for.
        getattr(imported, name)
    seconds = time.perf_counter() - started
    needed = required(args.distribution)
    size = sum(size_of(distribution, name.replace("-", "_")) for name, distribution in needed.items())
    print(
        json.dumps(
            {
                "system": args.distribution,
                "version": importlib.metadata.version(args.distribution),
                "import_seconds": round(seconds, 4),
                "megabytes": round(size / 1e6, 2),
                "distributions": sorted(needed),
            }
        )
    )


if __name__ == "__main__":
    main()
