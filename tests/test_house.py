"""The house's one rule: who may import whom."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
RANKS = (
    ("plugins.shared",),
    ("plugins",),
    ("training.model",),
    ("training.__init__",),
    ("runtime",),
    ("export", "training"),
)
"""A module may import its own room and rooms further up; rooms of one line do not know each other."""


def room(module: str) -> tuple[int, str]:
    """Return the rank and the name of the room that a module, such as training.model.config, is in."""
    found = [(len(name), rank, name) for rank, names in enumerate(RANKS) for name in names if within(module, name)]
    _, rank, name = max(found)
    return rank, name


def within(module: str, name: str) -> bool:
    return module == name or module.startswith(f"{name}.")


def imports(path: Path) -> list[str]:
    """Return the modules of misf that a file imports, wherever in it, as training.model.config."""
    package = path.relative_to(ROOT).parent.parts
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            module = ".".join([*base, *([node.module] if node.module else [])])
            found += [f"{module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom | ast.Import):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            found += [name.removeprefix("misf.") for name in names if name.startswith("misf.")]
    return [f"{name}.__init__" if name == "training" else name for name in found]


def test_imports_go_one_way() -> None:
    files = [path for folder in ("plugins", "training", "export", "runtime") for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 50
    wrong, arrows = [], set()
    for path in files:
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        rank, name = room(module)
        for other in imports(path):
            other_rank, other_name = room(other)
            if name != other_name:
                arrows.add((name, other_name))
            if other_name != name and other_rank >= rank:
                wrong.append(f"{module} imports {other}")
    assert not wrong, "\n".join(wrong)
    assert ("runtime", "training.model") in arrows  # the reader of imports reads something
