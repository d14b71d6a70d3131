"""The results file, its tables, and the page that shows them: nothing on the page is written by hand.

`benchmarks.json` holds, for every section, when, where and how it was measured, and its rows. The tables are generated from it, in
`benchmarks.md` and between the marks `<!-- bench:a -->` and `<!-- /bench:a -->` of the page. The tables of another file (`--out`) are only
written next to it: `benchmarks_fast.json` and `benchmarks_avx2.json` are of other machines.
"""

import json
import re
from pathlib import Path
from typing import Any

from experiments.benchmarks.suite import Section
from fedsim.files import atomic_write, atomic_write_json

FOLDER = Path(__file__).parents[1] / "results"
PAGE = Path(__file__).parents[2] / "docs" / "performance.md"

Results = dict[str, Any]
"""{letter: {title, made: {date, command, quick, commit, hardware, versions}, rows: [...]}}."""


def load(path: Path) -> Results:
    """Returns the results of a file, none where it does not exist."""
    return json.loads(path.read_bytes()) if path.exists() else {}


def save(results: Results, path: Path, sections: list[Section], page: Path | None = None) -> None:
    """Writes the JSON, the Markdown next to it, and the tables of the page if one is given; each file is replaced atomically."""
    atomic_write_json(path, results)
    texts = section_texts(results, sections)
    atomic_write(path.with_suffix(".md"), document(texts, sections).encode())
    if page is not None:
        atomic_write(page, filled(page.read_text(), texts).encode())


def section_texts(results: Results, sections: list[Section]) -> dict[str, str]:
    """Returns the text of each measured section, by letter."""
    return {section.letter: section_text(section, results[section.letter]) for section in sections if section.letter in results}


def document(texts: dict[str, str], sections: list[Section]) -> str:
    """Returns the Markdown of all sections."""
    titles = {section.letter: section.title for section in sections}
    whole = "\n\n".join(f"## {titles[letter]}\n\n{text}" for letter, text in texts.items())
    return f"# Benchmarks\n\n{whole}\n"


def filled(page: str, texts: dict[str, str]) -> str:
    """Returns the page with each text between the marks of its letter; a letter without marks is skipped."""
    for letter, text in texts.items():
        marks = re.compile(rf"(<!-- bench:{letter} -->\n).*?(<!-- /bench:{letter} -->)", re.DOTALL)
        page = marks.sub(lambda found, text=text: f"{found[1]}{text}\n{found[2]}", page)  # type: ignore[misc]
    return page


def section_text(section: Section, found: dict[str, Any]) -> str:
    """Returns the table of a section, what is compared, and how it was measured."""
    rows = [row["case"] | row["found"] for row in found["rows"]]
    notes = [f"Not measured: {_named(row['case'])}: {_reason(row['found'])}." for row in found["rows"] if _reason(row["found"])]
    good = [row for row in rows if "failed" not in row]
    parts = [
        markdown_table(section, good),
        section.summary(good) if good else "",
        section.about,
        *notes,
        _made(found["made"], found["rows"]),
    ]
    return "\n\n".join(part for part in parts if part)


def _reason(found: dict[str, Any]) -> str:
    return str(found.get("failed") or found.get("skipped") or "").rstrip(".")


def _named(case: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in case.items())


def markdown_table(section: Section, rows: list[dict[str, Any]]) -> str:
    """Returns the rows as a Markdown table; columns that hold nothing are left out."""
    columns = [column for column in section.columns if any(column.cell(row) for row in rows)]
    if not columns:
        return ""
    lines = [[column.head for column in columns], ["---"] * len(columns), *([column.cell(row) for column in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _made(made: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Returns when, where and how a section was measured, and whether the machine was busy: more than one waiting process per core."""
    hardware, versions = made["hardware"], made["versions"]
    kernels = f" ({hardware['cpu_capability']})" if "cpu_capability" in hardware else ""
    devices = ", ".join(hardware["gpus"]) or f"{hardware['cpu']}{kernels}, {hardware['cores']} cores"
    load = max((row["load"] for row in rows), default=0.0)
    commit = made["commit"]["id"][:10] if made["commit"] else "unknown"
    names = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "flwr", "peft") if versions.get(name))
    busy = f" The machine was busy (load {load:.1f}): absolute figures are too low." if load > 2 * hardware["cores"] else ""
    quick = " A quick try with few turns." if made["quick"] else ""
    return f"<sub>{made['started'][:16]}, {devices}, commit {commit}, {names}; load {load:.1f}.{quick}{busy} `{made['how']}`</sub>"
