"""What the documentation names is there: files, modules, config files and config fields."""

import re
from pathlib import Path

import pytest

from launch import entry
from stepdr_jax import configuration

ROOT = Path(__file__).parents[2]
PAGES = [
    path.relative_to(ROOT)
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "launch").rglob("*.md")]
    if path.name != "CHANGELOG.md"
]
OURS = ("launch", "tools_env", "stepdr_jax", "configs", "tests", "docs")


def commands(text: str) -> list[list[str]]:
    """Words after `python -m` or `bash` of every command of ours in code blocks and inline code."""
    text = re.sub(r"\\\n\s*", " ", text)
    spans = re.findall(r"^```(?:bash|sh)?\n(.*?)^```", text, re.M | re.S) + re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)
    found = []
    for line in "\n".join(spans).splitlines():
        for match in re.finditer(r"(?:python -m|bash) ((?:launch|tools_env)[./][^|&;>#`\n]*)", line):
            words = match[1].split()
            found.append([word.strip("\"'),") for word in words])
    return found


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_files_that_a_page_names_exist(page):
    text = (ROOT / page).read_text()
    named = re.findall(rf"`((?:{'|'.join(OURS)})/[\w./-]*\w)/?`", text)
    missing = [name for name in named if not (ROOT / name).exists() and "*" not in name and "mine" not in name]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_commands_of_a_page_name_modules_configs_and_fields_that_exist(page):
    wrong = []
    for words in commands((ROOT / page).read_text()):
        module = words[0]
        path = ROOT / (module if "/" in module else module.replace(".", "/") + ".py")
        if not path.exists() and not (path.with_suffix("") / "__main__.py").exists():
            wrong.append(module)
        file = next((word.partition("=")[2] for word in words if word.startswith("--config=")), "configs/miniature.py")
        if not (ROOT / file).exists():
            wrong += [file] if not re.search(r"mine|own|runs/|Y\.py|\.\.\.", file) else []
            file = "configs/miniature.py"
        config = entry.load(ROOT / file)
        for word in words[1:]:
            if word.startswith("--config.") and "FIELD" not in word:
                field = word.removeprefix("--config.").partition("=")[0].rstrip(".*")
                wrong += [word] if configuration.unknown_field(config, field) else []
    assert wrong == []


def test_commands_are_found():
    page = (
        "Run `python -m launch.sft --config.seed=1` or\n```bash\nbash launch/test.sh tests/rl \\\n    -k replay\n```\n"
    )
    assert sorted(commands(page)) == [["launch.sft", "--config.seed=1"], ["launch/test.sh", "tests/rl", "-k", "replay"]]
