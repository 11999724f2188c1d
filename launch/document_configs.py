"""Writes docs/configuration.md, the reference of all config fields, from configs/base.py.

python -m launch.document_configs
"""

from pathlib import Path

from absl import app

from configs import base
from stepdr_jax import files
from stepdr_jax.configuration import Field, Section

PAGE = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"
HEAD = """# Config fields

Made from `configs/base.py` by `python -m launch.document_configs`. Any command changes a field with
`--config.FIELD=VALUE` and takes a Python file, or the `config.json` that a run or stage has written, as `--config`:

    python -m launch.quickstart --config=runs/a/config.json --config.run_dir=runs/b --config.sft.steps=900

starts a variant of a whole run. To repeat one stage only, give the new run the data and the checkpoint that the stage
starts from:

    mkdir runs/b && cp -r runs/a/tokenizer runs/a/data runs/b
    python -m launch.sft --config=runs/a/seed0/sft/config.json --config.run_dir=runs/b --config.sft.steps=900 \\
        --config.first_stage=sft --config.initial_checkpoint=runs/a/seed0/midtrain2/checkpoints

Conditions between fields are `CROSS_CHECKS` in `stepdr_jax/configuration.py`. JSON has no tuples: a list becomes one.
"""


def page(declared: Section) -> str:
    """The reference as Markdown; sections with equal fields share a table."""
    sections: list[tuple[list[str], Section]] = []

    def collect(name: str, section: Section) -> None:
        for names, other in sections:
            if other.members == section.members:
                names.append(name)
                break
        else:
            sections.append(([name] if name else [], section))
        for inner, member in section.members.items():
            if isinstance(member, Section):
                collect(f"{name}.{inner}".strip("."), member)

    collect("", declared)
    return "\n".join([HEAD, *(_table(names, section) for names, section in sections)])


def _table(names: list[str], section: Section) -> str:
    title = f"{', '.join(f'`{name}`' for name in names)}: " if names else ""
    lines = [
        f"## {title}{section.note}",
        "",
        "| field | default | must be | meaning, unit or source |",
        "|---|---|---|---|",
    ]
    for name, field in section.members.items():
        if isinstance(field, Field):
            lines.append(f"| `{name}` | `{field.default!r}` | {field.rule.expects} | {field.note} |")
    return "\n".join([*lines, ""])


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"expected no arguments, got {argv[1]!r}")
    files.write_atomic(PAGE, page(base.FIELDS))
    print(PAGE)


if __name__ == "__main__":
    app.run(main)
