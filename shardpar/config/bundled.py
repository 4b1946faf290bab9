"""Where the models and configs that come with shardpar are, and how a written path is found.

In a wheel they are in `shardpar/_bundled`; in a clone or an editable install they stand at the
root of the repository.
"""

from __future__ import annotations

import glob
import os
import re
from pathlib import Path

from shardpar.errors import ConfigError

_TRAINS = re.compile(r"^TRAINS = ", re.MULTILINE)


def bundled_root() -> Path:
    """The folder that holds the bundled `models/` and `configs/`.

    Raises:
      ConfigError: the installation has lost them.
    """
    package = Path(__file__).resolve().parents[1]
    for root in (package / "_bundled", package.parent):
        if (root / "models").is_dir() and (root / "configs").is_dir():
            return root
    raise ConfigError(
        f"{package}: the bundled models and configs are missing; reinstall shardpar: "
        "pip install --force-reinstall shardpar"
    )


def bundled_models() -> dict[str, Path]:
    """The bundled model files by name.

    >>> bundled_models()["gpt"].name
    'gpt.py'
    """
    package = Path(__file__).resolve().parents[1]
    over_tables = [
        file
        for file in (package / "ps" / "algorithms").glob("*.py")
        if _TRAINS.search(file.read_text())
    ]
    files = [*(bundled_root() / "models").glob("*.py"), *over_tables]
    return {f.stem: f for f in sorted(files, key=lambda f: f.stem) if not f.stem.startswith("_")}


def bundled_configs() -> tuple[str, ...]:
    """The bundled configs, as they can be given to `load` from any folder.

    >>> "configs/gpt.gin" in bundled_configs()
    True
    """
    files = sorted((bundled_root() / "configs").iterdir())
    return tuple(f"configs/{f.name}" for f in files if f.suffix in (".gin", ".yaml"))


def demo_config() -> Path:
    """The config that `shardpar train` runs when none is named."""
    return bundled_root() / "configs" / "gpt.gin"


def find_file(written: str, folder: str | None) -> str | None:
    """Finds the file or folder that a path in a config means.

    Args:
      written: the path as written; `~` is the home folder.
      folder: where the config that wrote it is; None for a path given on the command line.

    Returns:
      The first that exists of: the path in `folder`, the path in the current folder, and for
      `configs/...` and `models/...` the bundled file. None if there is none.

    >>> find_file("configs/gpt.gin", None) is not None, find_file("no/such.gin", None)
    (True, None)
    """
    path = os.path.expanduser(written)
    candidates = [path] if folder is None else [os.path.join(folder, path), path]
    found = next((path for path in candidates if written and os.path.exists(path)), None)
    if found is None and os.path.normpath(path).split(os.sep)[0] in ("configs", "models"):
        bundled = os.path.join(bundled_root(), path)
        return bundled if os.path.isfile(bundled) else None
    return found


def find_data(written: str, folder: str | None, *, patterns: bool = False) -> str:
    """Finds a file that must exist before a run starts.

    Args:
      written: the path as written.
      folder: as for `find_file`.
      patterns: whether the path may be a glob, such as `texts/*.txt`.

    Returns:
      The absolute path or glob.

    Raises:
      ValueError: nothing is there, or a folder is.
    """
    found = find_file(written, folder)
    if found is not None and os.path.isdir(found):
        hint = f", such as {os.path.join(written, '*.txt')!r}" if patterns else ""
        raise ValueError(f"{written!r} is a folder; name a file{hint}")
    if found is not None:
        return os.path.abspath(found)
    if patterns and glob.has_magic(written):
        path = os.path.expanduser(written)
        folders = [os.getcwd()] if folder is None else [os.path.abspath(folder), os.getcwd()]
        for base in folders:
            pattern = os.path.join(glob.escape(base), path)
            if next(glob.iglob(pattern, recursive=True), None) is not None:
                return pattern
    where = " or ".join(dict.fromkeys(os.path.abspath(f) for f in (folder or "", "")))
    kind = "no file matches" if patterns and glob.has_magic(written) else "there is no file"
    raise ValueError(f"{kind} {written!r} in {where}")


def find_folder(written: str, folder: str | None) -> str:
    """Finds a folder of data that must exist before a run starts.

    Args:
      written: the path as written.
      folder: as for `find_file`.

    Returns:
      The absolute path.

    Raises:
      ValueError: nothing is there, or a file is.
    """
    found = find_file(written, folder)
    if found is None:
        where = " or ".join(dict.fromkeys(os.path.abspath(f) for f in (folder or "", "")))
        raise ValueError(f"there is no folder {written!r} in {where}")
    if not os.path.isdir(found):
        raise ValueError(f"{written!r} is no folder; name the one that holds offsets.npy")
    return os.path.abspath(found)
