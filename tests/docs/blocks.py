"""Reads the fenced blocks of a page and runs them the way a reader would.

```sh       each line is `shardpar ...` or `cat > FILE <<'EOF'`; `# exits with 2` at its end
            says that it must fail. A block of `python3 -m venv`, `pip` or `git clone` is left out.
```python   a script of its own, on 8 virtual CPU devices
```python, ```yaml, ```gin below `<!-- file: NAME -->` are written to NAME, and a script below
            `<!-- run: NAME -->` is also run
```text     what the block before it prints: each line must be there, in this order, whatever
            the numbers are. A line `…` stands for lines left out, and `…` at the end of a
            line for its rest. Below `<!-- example -->` it is not compared.
```yaml     below `<!-- shows: NAME -->` is compared with the file NAME in the same way
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HOME = "/home/ann/gpt"
"""Where pages say that they were run; the folder a page really ran in is called so."""

LANGUAGES = {"sh", "python", "yaml", "gin", "text", "json"}
_SET_UP = re.compile(r"(python3 -m venv|pip|git clone)\b")
_EXITS = re.compile(r"#\s*exits with (\d+)\s*$")
_HEREDOC = re.compile(r"cat > (\S+) <<'EOF'")


def environment() -> dict[str, str]:
    """Of a reader, whose programs are compiled as they are outside of tests."""
    return {k: v for k, v in os.environ.items() if k != "JAX_DISABLE_MOST_OPTIMIZATIONS"}


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, its first line, and the comment right above it."""

    language: str
    text: str
    line: int
    marker: str = ""


@dataclass(frozen=True)
class Write:
    name: str
    text: str
    line: int


@dataclass(frozen=True)
class Command:
    arguments: tuple[str, ...]
    exit_code: int
    line: int


@dataclass(frozen=True)
class Script:
    name: str
    text: str
    line: int


@dataclass(frozen=True)
class Output:
    """Text that the actions since the last other kind of block printed, or that a file holds."""

    text: str
    line: int
    file: str = ""


Action = Write | Command | Script | Output


def blocks(page: str) -> Iterator[Block]:
    """The fenced blocks of a Markdown page, in order."""
    fence: Block | None = None
    indent, content, marker = "", [], ""
    for number, line in enumerate(page.splitlines(), 1):
        if fence is not None:
            if line.strip() == "```":
                yield Block(fence.language, "\n".join(content) + "\n", fence.line, fence.marker)
                fence, marker = None, ""
            else:
                content.append(line.removeprefix(indent))
        elif opened := re.match(r"(\s*)```(\w*)\s*$", line):
            fence, indent, content = Block(opened[2], "", number + 1, marker), opened[1], []
        elif comment := re.fullmatch(r"\s*<!--\s*(.*?)\s*-->\s*", line):
            marker = comment[1]
        elif line.strip():
            marker = ""
    assert fence is None, f"line {fence.line}: the block is never closed"


def actions(page: str) -> Iterator[Action]:
    """What to do for a page, in order."""
    for block in blocks(page):
        kind, _, name = block.marker.partition(": ")
        if kind == "file":
            yield Write(name, block.text, block.line)
        elif block.language == "sh":
            yield from _shell(block)
        elif block.language == "python":
            yield Script(name if kind == "run" else f"line_{block.line}.py", block.text, block.line)
        elif kind == "shows":
            yield Output(block.text, block.line, name)
        elif block.language == "text" and kind != "example":
            yield Output(block.text, block.line)


def _shell(block: Block) -> Iterator[Action]:
    if _SET_UP.match(block.text):
        return
    heredoc: Write | None = None
    continued = ""
    for number, line in enumerate(block.text.splitlines(), block.line):
        if heredoc is not None:
            if line == "EOF":
                yield heredoc
                heredoc = None
            else:
                heredoc = Write(heredoc.name, f"{heredoc.text}{line}\n", heredoc.line)
        elif line.endswith("\\"):
            continued += line[:-1]
        elif opened := _HEREDOC.fullmatch(line):
            heredoc = Write(opened[1], "", number)
        elif words := shlex.split(continued + line, comments=True):
            continued = ""
            assert words[0] == "shardpar", f"line {number}: {line!r} is no `shardpar` command"
            exits = _EXITS.search(line)
            yield Command(tuple(words[1:]), int(exits[1]) if exits else 0, number)


class Reader:
    """Follows one page in one folder."""

    def __init__(self, folder: Path, compare_output: bool = True) -> None:
        self.folder, self.compare_output = folder, compare_output
        self.printed = ""
        self.fresh = False

    def follow(self, page: str) -> None:
        """Does all that the page says.

        Raises:
          AssertionError: with the line of the page, where something is not as the page says.
        """
        for action in actions(page):
            if isinstance(action, Output):
                self._compare(action)
                self.fresh = False
                continue
            if not self.fresh:
                self.printed, self.fresh = "", True
            if isinstance(action, Write):
                path = self.folder / action.name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(action.text)
            elif isinstance(action, Command):
                self._run(
                    ["-P", "-m", "shardpar", *action.arguments], action.line, action.exit_code
                )
            else:
                (self.folder / action.name).write_text(action.text)
                self._run([action.name], action.line, 0, JAX_NUM_CPU_DEVICES="8", NPROC="64")

    def _run(self, arguments: list[str], line: int, exit_code: int, **variables: str) -> None:
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=self.folder,
            env={
                **environment(), "COLUMNS": "120", "NO_COLOR": "1", "PYTHONUNBUFFERED": "1",
                **variables,
            },
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", timeout=600,
            check=False,
        )  # fmt: skip
        self.printed += done.stdout
        assert done.returncode == exit_code, (
            f"line {line}: {' '.join(arguments)} exited with {done.returncode}, "
            f"not {exit_code}:\n{done.stdout[-3000:]}"
        )

    def _compare(self, output: Output) -> None:
        if not self.compare_output:
            return
        source = (self.folder / output.file).read_text() if output.file else self.printed
        real = [plain(row, self.folder) for row in source.splitlines()]
        at = 0
        for number, row in enumerate(output.text.splitlines(), output.line):
            wanted, more, _ = plain(row, self.folder).partition("…")
            wanted = wanted.strip()
            if not wanted:
                continue
            found = next(
                (
                    i
                    for i in range(at, len(real))
                    if (real[i].startswith(wanted) if more else real[i] == wanted)
                ),
                None,
            )
            assert found is not None, (
                f"line {number}: {row!r} is not in what was printed (below what the page shows "
                f"above it):\n{source[-6000:]}"
            )
            at = found + 1


def plain(row: str, folder: Path) -> str:
    """A line of output without what differs from run to run: numbers, widths, the folder."""
    row = row.replace(str(folder), HOME).replace(os.path.realpath(folder), HOME)
    row = re.sub(r"\d[\d,.:_-]*\d|\d", "#", row)
    return re.sub(r"[\s─-╿]+", " ", row).strip()
