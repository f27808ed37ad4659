"""Write the parts of the documentation that the program itself knows best.

    python docs/make_docs.py            # write them
    python docs/make_docs.py --check    # exit 1 where one is out of date, and say which

``docs/rules.md`` is the text of ``probe rule --all`` with its headings one level down, and the
thresholds. In other files what stands between ``<!-- made: NAME -->`` and ``<!-- end: NAME -->`` is
made, and what follows ``<!-- example: FILE -->`` is that file.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
from pathlib import Path

from divergence_probe.cli import main as probe
from divergence_probe.diagnosis.root_cause import PRECEDENCE
from divergence_probe.record import schema
from divergence_probe.rules.base import Rule
from divergence_probe.rules.registry import all_rules
from divergence_probe.thresholds import CATALOGUE

ROOT = Path(__file__).resolve().parent.parent
_OWN = "divergence_probe."


def rules_page() -> str:
    """``docs/rules.md``."""
    text = _without_foreign(_printed("rule", "--all"))
    head, _, body = text.partition("\n# ")
    head = re.sub(r"^\| ([A-Z]+\d+) \| ([a-z-]+) \|", _linked, head, flags=re.M)
    numbers = _table(
        ("name", "default", "unit", "why this value"),
        [(f"`{t.name}`", f"{t.default:g}", t.unit, t.source) for t in CATALOGUE],
    )
    thresholds = "\n".join(["## Thresholds", "", _TELLING, "", *numbers])
    return (
        f"{head.rstrip()}\n\n{_MADE}\n\n{thresholds}\n\n"
        f"<!-- fmt: off -->\n\n{_one_down('# ' + body)}\n<!-- fmt: on -->\n"
    )


_MADE = (
    "Made by `python docs/make_docs.py` from the text of `probe rule --all`; `probe rule CODE` "
    "shows one rule. A rule without a cause sees a symptom: which cause is behind it is for the "
    "other findings to say, see [causes.md](causes.md)."
)
_TELLING = "Each can be overridden with `--threshold NAME=VALUE` or `attach(thresholds={...})`."


def _printed(*arguments: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as output:
        probe(arguments)
    return output.getvalue()


def own_rules() -> list[type[Rule]]:
    """The rules of this package, without those that plugins or tests have added."""
    return [rule for rule in all_rules() if rule.__module__.startswith(_OWN)]


def _without_foreign(text: str) -> str:
    """Leave out rules of plugins installed here."""
    for rule in set(all_rules()) - set(own_rules()):
        text = text.replace(f"| {rule.code} | {rule.name} |", "| foreign |")
        title = re.escape(f"# {rule.name} ({rule.code})")
        text = re.sub(rf"^{title}\n.*?(?=^# |\Z)", "", text, flags=re.M | re.S)
    return re.sub(r"^\| foreign \|.*\n", "", text, flags=re.M)


def _linked(row: re.Match[str]) -> str:
    code, name = row.groups()
    return f"| [{code}](#{name}-{code.lower()}) | {name} |"


def _one_down(text: str) -> str:
    """Every heading one level deeper; comments in code stay what they are."""
    lines, in_code = [], False
    for line in text.splitlines():
        in_code ^= line.startswith("```")
        lines.append(f"#{line}" if line.startswith("#") and not in_code else line)
    return "\n".join(lines).rstrip() + "\n"


def causes() -> str:
    """Causes with the rules that point at them and what those see."""
    rows: list[tuple[str, ...]] = []
    for cause in (*PRECEDENCE, None):
        rules = [rule for rule in own_rules() if rule.cause == cause]
        if rules:
            codes = ", ".join(f"[{r.code}](docs/rules.md#{r.name}-{r.code.lower()})" for r in rules)
            seen = " ".join(rule.documentation()[""] for rule in rules)
            shown = f"[`{cause}`](docs/causes.md#{cause})" if cause else "(symptoms)"
            rows.append((shown, codes, " ".join(seen.split())))
    return "\n".join(_table(("cause", "rules", "what they see"), rows))


def columns() -> str:
    """The columns of ``steps.arrow``."""
    parts = []
    for title, table in (
        ("One number a row", schema.SCALAR_COLUMNS),
        ("One number a parameter (a list, in the order of the layout's `parameters`)",
         schema.PARAMETER_COLUMNS),
        ("One number a normalisation layer (a list, in the order of the layout's `batch_norms`)",
         schema.BATCH_NORM_COLUMNS),
    ):  # fmt: skip
        rows = [(f"`{name}`", text) for name, text in table.items()]
        parts += [f"{title}:", "", *_table(("column", "meaning and unit"), rows), ""]
    flags = ", ".join(f"{bit} `{name}`" for name, bit in schema.FLAGS.items())
    return "\n".join([*parts, f"Bits of `flags`: {flags}."])


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return lines + [
        "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows
    ]


def documents() -> dict[Path, str]:
    """Every file with made parts, as it should read."""
    made = {ROOT / "docs" / "rules.md": rules_page()}
    for name, parts in {
        "README.md": {"causes": causes},
        "docs/recording.md": {"columns": columns},
    }.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        for part, make in parts.items():
            start, end = f"<!-- made: {part} -->", f"<!-- end: {part} -->"
            before, _, rest = text.partition(start)
            _, _, after = rest.partition(end)
            text = f"{before}{start}\n{make()}\n{end}{after}"
        made[ROOT / name] = text
    contributing = ROOT / "CONTRIBUTING.md"
    made[contributing] = _EXAMPLE.sub(_quoted, contributing.read_text(encoding="utf-8"))
    return made


_EXAMPLE = re.compile(r"<!-- example: (\S+) -->\n```python\n.*?\n```\n", re.S)


def _quoted(found: re.Match[str]) -> str:
    """The file named in an example's comment, whole."""
    code = (ROOT / found[1]).read_text(encoding="utf-8")
    return f"<!-- example: {found[1]} -->\n```python\n{code}```\n"


def main() -> int:
    """Write or check; the number of files out of date is not 0 only with ``--check``."""
    stale = [
        path
        for path, text in documents().items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    ]
    if "--check" in sys.argv[1:]:
        for path in stale:
            print(f"{path.relative_to(ROOT)} is out of date: python docs/make_docs.py")
        return int(bool(stale))
    for path in stale:
        path.write_text(documents()[path], encoding="utf-8")
        print(path.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
