"""Runs a packed folder: python3 run.py [--budget SECONDS] [--only MODEL]... [--torch] [--json]

Needs only Python 3.11 or newer and its folder: no network, no compiler, nothing installed. It reads meters and changes
no setting of a device. Wheels are unpacked into `lib/` once; readings go into `catalog.sqlite`.
"""

import argparse
import os
import sys
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
LEAST = (3, 11)


def _suits(wheel: Path) -> bool:
    python, abi = wheel.stem.split("-")[-3:-1]
    mine = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    return mine in python.split(".") or "py3" in python.split(".") or abi == "abi3"


def _unpack(archive: Path, folder: Path) -> None:
    if folder.is_dir():
        return
    made = folder.with_name(f".{folder.name}.{os.getpid()}")
    with zipfile.ZipFile(archive) as file:
        file.extractall(made)
    for tool in made.glob("iree/_runtime_libs/iree-*"):
        tool.chmod(0o755)
    made.rename(folder)


def _unpack_blobs() -> None:
    """Decompress the packed blobs, once; each file appears atomically."""
    with zipfile.ZipFile(HERE / "blobs.zip") as file:
        for name in file.namelist():
            path = HERE / name
            if not path.is_file():
                path.parent.mkdir(parents=True, exist_ok=True)
                draft = path.with_suffix(".part")
                draft.write_bytes(file.read(name))
                draft.replace(path)


def _libraries() -> list[str]:
    found = [wheel for wheel in sorted((HERE / "wheels").glob("*.whl")) if _suits(wheel)]
    for wheel in found:
        _unpack(wheel, HERE / "lib" / wheel.stem)
    return [str(HERE / "lib" / wheel.stem) for wheel in found]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _main() -> int:
    if sys.version_info < LEAST:
        _say(f"error: this is Python {sys.version.split()[0]}, 3.11 or newer is needed: python3.11 run.py")
        return 2
    parser = argparse.ArgumentParser(description="Measure what was packed on this machine.")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds; what does not fit is named")
    parser.add_argument("--only", action="append", default=[], metavar="MODEL", help="measure this; may be given again")
    parser.add_argument("--torch", action="store_true", help="time PyTorch too, though no GPU is measured")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    asked = parser.parse_args()
    code = HERE / "lib" / "code"
    _unpack(HERE / "code.zip", code)
    _unpack_blobs()
    paths = [str(code), *_libraries()]
    sys.path[:0] = paths
    try:
        from llmbuild.process import child

        child.look_in(paths)
        from llmbuild.carry.packed import main
    except ImportError as error:
        version = ".".join(map(str, sys.version_info[:2]))
        _say(f"error: {error}: pack again with `--python {version}`, or pip install iree-base-runtime numpy here")
        return 2
    try:
        return main(str(HERE), asked.budget, asked.json, _say, asked.torch, asked.only)
    except KeyboardInterrupt:
        _say("interrupted; what was finished is kept")
        return 130


if __name__ == "__main__":
    sys.exit(_main())
