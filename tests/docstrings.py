"""Docstrings, read as numpydoc reads them."""

from __future__ import annotations

import re

SECTIONS = ("Parameters", "Attributes", "Methods", "Returns", "Raises", "Notes", "References", "Examples")


def sections(doc: str) -> dict[str, list[str]]:
    """The lines of each section of a docstring, without those around it. An error where numpydoc would see another."""
    lines, found, name = doc.splitlines(), {}, None
    for number, line in enumerate(lines):
        under = lines[number + 1] if number + 1 < len(lines) else ""
        if set(under) == {"-"} and line in SECTIONS:
            assert len(under) == len(line) and not lines[number - 1], line
            assert line not in found and all(SECTIONS.index(other) < SECTIONS.index(line) for other in found), line
            name, found[line] = line, []
        else:
            assert re.split("  |$", line)[0] not in (*SECTIONS, "Source", "Example"), f"no section: {line}"
            if name and set(line) != {"-"}:
                found[name].append(line)
    for name, body in found.items():
        found[name] = "\n".join(body).strip("\n").splitlines()
        assert found[name], f"{name} is empty"
    return found


def parameters(section: list[str]) -> list[str]:
    """The names in a section of parameters, which nothing else may stand in."""
    heads = [line for line in section if not line.startswith("    ")]
    assert all(" : " in line for line in heads), heads
    names = [name.lstrip("*") for line in heads for name in line.split(" : ")[0].split(", ")]
    assert all(map(str.isidentifier, names)), names
    return names
