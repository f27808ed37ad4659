"""The documentation speaks of commands, options, rules, causes and files that exist."""

from __future__ import annotations

import argparse
import io
import re
import runpy
import shlex
import tomllib
from contextlib import redirect_stderr
from pathlib import Path

import pytest

import divergence_probe
from divergence_probe.commands.registry import all_commands
from divergence_probe.config import read_config
from divergence_probe.diagnosis.root_cause import PRECEDENCE
from divergence_probe.report.registry import parse_destination
from divergence_probe.rules.registry import all_rules
from divergence_probe.rules.selection import INTENTS
from divergence_probe.thresholds import CATALOGUE

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
TEXTS = {path: path.read_text(encoding="utf-8") for path in PAGES}
IDS = [str(path.relative_to(ROOT)) for path in PAGES]
#: What exists in the examples of CONTRIBUTING.md only.
EXAMPLE_RULES, EXAMPLE_COMMANDS, EXAMPLE_FORMATS = {"EXAMPLE001"}, {"sites"}, {"tsv"}

each_page = pytest.mark.parametrize("page", PAGES, ids=IDS)


# -- commands -------------------------------------------------------------------------------------


def commands_in(text: str) -> list[list[str]]:
    """Every ``probe ...`` of code blocks and inline code, split as a shell would."""
    blocks = re.findall(r"^```(?:console|bash|sh|text)?\n(.*?)^```", text, re.M | re.S)
    lines = [line for block in blocks for line in block.splitlines()]
    lines += re.findall(r"`(probe [^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    found = []
    for line in lines:
        for part in line.removeprefix("$ ").split(" && "):
            if part.startswith("probe "):
                found.append(shlex.split(part.partition("  #")[0])[1:])
    return found


def placeholder(token: str) -> bool:
    return "..." in token or token.startswith("[")


def parse(arguments: list[str]) -> None:
    """Parse as the command line does.

    Raises:
        AssertionError: there is no such command or option.
    """
    name, rest = arguments[0], [token for token in arguments[1:] if not placeholder(token)]
    if name.isupper() or name.startswith("-") or name in EXAMPLE_COMMANDS:
        return
    assert name in all_commands(), f"probe {' '.join(arguments)}: there is no such command"
    command = all_commands()[name]()
    parser = command.parser()
    options = {text: action for action in parser._actions for text in action.option_strings}
    for token in rest:
        if token.startswith("-") and name != "run":
            assert token.partition("=")[0] in options, f"{name} {token}"
    if name == "run":
        _parse_run(command, parser, options, rest)


def _parse_run(
    command: object,
    parser: argparse.ArgumentParser,
    options: dict[str, argparse.Action],
    rest: list[str],
) -> None:
    values = {
        "FORMAT[:PATH]": "json",
        "LEVEL": "error",
        "SECONDS": "1",
        "NAME=VALUE": "norm-growth=1",
    }
    tokens = [values.get(token, token) for token in rest if token != "OPTIONS"]
    if not tokens or all(
        token in options for token in tokens
    ):  # "probe run --confirm" in a sentence
        return
    if not any(t.endswith(".py") or t in ("SCRIPT", "-m") for t in tokens):
        tokens.append("SCRIPT")
    with redirect_stderr(io.StringIO()) as said:
        try:
            parsed = command.parse(parser, tokens)  # type: ignore[attr-defined]
        except SystemExit:
            raise AssertionError(f"probe run {' '.join(tokens)}: {said.getvalue()}") from None
    for destination in parsed.report or ():
        if destination.partition(":")[0] not in EXAMPLE_FORMATS:
            parse_destination(destination)


@each_page
def test_commands_and_options_exist(page: Path) -> None:
    for arguments in commands_in(TEXTS[page]):
        parse(arguments)


def test_commands_are_found_at_all() -> None:
    commands = commands_in(TEXTS[ROOT / "README.md"])
    assert ["demo"] in commands
    assert any(c[0] == "run" and "train.py" in c for c in commands)


@pytest.mark.parametrize("wrong", ["run --no-such train.py", "frobnicate X", "check --no-such X"])
def test_wrong_commands_are_seen(wrong: str) -> None:
    with pytest.raises(AssertionError):
        parse(wrong.split())


def test_contract_lists_every_option_of_run() -> None:
    text = TEXTS[ROOT / "docs" / "contract.md"]
    for action in all_commands()["run"]().parser()._actions:
        for option in action.option_strings:
            if option not in ("-h", "--help"):
                assert f"`{option}" in text or f", `{option}" in text, option


def test_contract_lists_every_command() -> None:
    text = TEXTS[ROOT / "docs" / "contract.md"]
    for name, command in all_commands().items():
        if command.__module__.startswith("divergence_probe."):
            assert f"`probe {name}" in text, name


# -- names ----------------------------------------------------------------------------------------


@each_page
def test_rule_codes_exist(page: Path) -> None:
    prefixes = {re.sub(r"\d+$", "", rule.code) for rule in all_rules()}
    codes = {
        code
        for code, prefix in re.findall(r"\b(([A-Z]{2,7})\d{3})\b", TEXTS[page])
        if prefix in prefixes
    }
    assert codes <= {rule.code for rule in all_rules()} | EXAMPLE_RULES


def test_every_cause_is_described() -> None:
    text = TEXTS[ROOT / "docs" / "causes.md"]
    described = set(re.findall(r"^### ([a-z-]+)$", text, re.M))
    known = set(PRECEDENCE) | {rule.cause for rule in all_rules() if rule.cause}
    assert described == known
    for part in re.split(r"^### ", text, flags=re.M)[1:]:
        for said in ("**What happens.**", "**What you see.**", "**What to do.**"):
            assert said in part, part.partition("\n")[0]


def test_intents_and_thresholds_exist() -> None:
    contract = TEXTS[ROOT / "docs" / "contract.md"]
    for intent in INTENTS:
        assert f"`{intent}`" in contract
    known = {threshold.name for threshold in CATALOGUE}
    for text in TEXTS.values():
        for name in re.findall(r"--threshold ([a-z-]+)=", text):
            assert name in known
        for name in re.findall(r"thresholds=\{\"([a-z-]+)\"", text):
            assert name in known


def test_settings_example_is_valid(tmp_path: Path) -> None:
    example = re.search(r"```toml\n(\[tool.*?)```", TEXTS[ROOT / "docs" / "contract.md"], re.S)
    assert example is not None
    tomllib.loads(example[1])
    (tmp_path / "pyproject.toml").write_text(example[1], encoding="utf-8")
    assert read_config(tmp_path).fail_on == "warning"


def test_python_api_lists_every_public_name() -> None:
    text = TEXTS[ROOT / "docs" / "python-api.md"]
    listed = re.findall(r"`(\w+)`", text.partition("Public names: ")[2].partition("\n\n")[0])
    assert sorted(listed) == sorted(divergence_probe.__all__)
    for name in divergence_probe.__all__:
        assert getattr(divergence_probe, name) is not None


def test_attach_options_are_the_ones_described() -> None:
    import inspect

    text = TEXTS[ROOT / "docs" / "python-api.md"]
    for function in (divergence_probe.attach, divergence_probe.assert_no_divergence):
        for parameter in inspect.signature(function).parameters:
            assert re.search(rf"\b{parameter}\b", text), f"{function.__name__}({parameter})"


@each_page
def test_python_examples_compile(page: Path) -> None:
    if page.name == "rules.md":  # a rule's example may be a fragment
        return
    for block in re.findall(r"^```python\n(.*?)^```", TEXTS[page], re.M | re.S):
        compile(block, str(page), "exec")


# -- links ----------------------------------------------------------------------------------------


def anchors(text: str) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    without_code = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    headings = re.findall(r"^#+ (.+)$", without_code, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_links_resolve(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", TEXTS[page], flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("https://", "http://")):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), f"{page.name}: {target}"
        if anchor and path.suffix == ".md":
            assert anchor in anchors(path.read_text(encoding="utf-8")), f"{page.name}: {target}"


@each_page
def test_nothing_of_the_machine_that_made_it(page: Path) -> None:
    found = re.findall(
        r"\.\./shared|\bshared/|(?<![\w.])/(?:home|root|tmp|opt|work|Users|mnt|var)/\S*",
        TEXTS[page],
    )
    assert not found


# -- made parts -----------------------------------------------------------------------------------


def test_made_parts_are_up_to_date() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "make_docs.py"))["documents"]()
    stale = [str(p.relative_to(ROOT)) for p, text in made.items() if TEXTS.get(p) != text]
    assert not stale, "python docs/make_docs.py"


# -- examples that are run ------------------------------------------------------------------------


def test_recording_example_reads_a_recording(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    torch.manual_seed(0)
    net = torch.nn.Linear(2, 1)
    with divergence_probe.attach(net, output=tmp_path / "FOLDER"):
        for _ in range(2):
            fast = list(net.parameters())
            for _ in range(3):
                x = torch.randn(4, 2)
                loss = torch.nn.functional.linear(x, *fast).square().mean()
                gradients = torch.autograd.grad(loss, fast)
                fast = [w - 0.1 * g for w, g in zip(fast, gradients, strict=True)]
    monkeypatch.chdir(tmp_path)
    text = TEXTS[ROOT / "docs" / "recording.md"]
    tables, arrow = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)[:2]
    names: dict[str, object] = {}
    exec(tables, names)
    assert len(names["support"]) == 12  # type: ignore[arg-type]
    exec(arrow, names)
    assert list(names["norms"].columns) == ["weight", "bias"]  # type: ignore[attr-defined]
    assert len(names["norms"]) == 6  # type: ignore[arg-type]
    assert "task-start" in set(names["events"].kind)  # type: ignore[attr-defined]
