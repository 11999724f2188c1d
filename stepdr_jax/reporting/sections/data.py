"""What the run trained on: tasks, episodes, reading rows, prepared mixtures."""

from collections.abc import Mapping
from typing import Any

from stepdr_jax.pages import plots
from stepdr_jax.reporting.collect import Run
from stepdr_jax.reporting.sections.wording import KIND_TITLES, LANG_TITLES, Section, counted, table
from stepdr_jax.runtime.stages import title_of


def section(run: Run) -> Section:
    found = run.data
    section: Section = {
        "present": "tasks" in found or "trajectories" in found,
        "figures": [],
        "tables": [],
        "notes": [],
    }
    section["prepared"] = "prepared" in found
    counts = []
    if found.get("documents"):
        counts.append(counted(found["documents"], "document"))
    tasks = found.get("tasks", [])
    if tasks:
        heldout = sum(row["count"] for row in tasks if row["split"] == "heldout")
        counts.append(f"{counted(sum(row['count'] for row in tasks), 'task')}, {heldout:,} of them held out by entity")
    trajectories = found.get("trajectories")
    if trajectories:
        counts.append(
            f"{counted(trajectories['kept'] + trajectories['dropped'], 'teacher episode')}, {trajectories['kept']:,} kept"
        )
    if found.get("reading"):
        counts.append(counted(sum(found["reading"].values()), "reading row"))
    if found.get("tokenizer"):
        counts.append(f"a byte-level BPE of {found['tokenizer']:,} ids learned from them")
    section["sentence"] = (f"The run made {'; '.join(counts)}." if counts else "") + (
        " Held-out tasks are about entities that no training task asks about." if tasks else ""
    )
    if tasks:
        kinds = list(dict.fromkeys(row["kind"] for row in tasks))
        columns = [(split, lang) for split in ("train", "heldout") for lang in ("en", "zh")]
        names = [f"{'held out' if split == 'heldout' else 'training'}, {LANG_TITLES[lang]}" for split, lang in columns]
        at = {(row["kind"], row["split"], row["lang"]): row["count"] for row in tasks}
        rows = [(KIND_TITLES.get(kind, kind), [at.get((kind, *column), 0) for column in columns]) for kind in kinds]
        section["figures"].append(
            plots.bar_chart(rows, title="Tasks by kind, language and split", x_label="tasks", names=names)
        )
    if trajectories:
        kept = sorted(trajectories["kept_by_capability"].items(), key=_most)
        rows = [(name.replace("_", " "), [count]) for name, count in kept]
        section["figures"].append(
            plots.bar_chart(rows, title="Teacher episodes kept, by capability", x_label="episodes")
        )
        if trajectories["dropped"]:
            rows = [(name.replace("_", " "), [count]) for name, count in trajectories["dropped_by_reason"].items()]
            section["figures"].append(
                plots.bar_chart(rows, title="Teacher episodes dropped, by reason", x_label="episodes")
            )
    if found.get("reading"):
        rows = [(name.replace("_", " "), [count]) for name, count in sorted(found["reading"].items(), key=_most)]
        section["figures"].append(plots.bar_chart(rows, title="Reading rows by mixture component", x_label="rows"))
    for stage, card in found.get("prepared", {}).get("stages", {}).items():
        section["tables"].append(_mixture_table(stage, card))
    copies = found.get("card", {}).get("trajectories", {}).get("renamed copies")
    if copies:
        section["notes"].append(f"Beside the kept episodes, training reads {copies:,} copies of them with other names.")
    if section["prepared"]:
        section["notes"].append(
            "Rate: share of tokens that training draws from a component, as configured. Share of tokens: what the component is on "
            "disk. Fill: used positions of a packed row."
        )
    return section


def _most(item: tuple[str, int]) -> int:
    return -item[1]


def _mixture_table(stage: str, card: Mapping[str, Any]) -> Section:
    rows = []
    for name, part in sorted(card["components"].items(), key=lambda item: -item[1]["rate"]):
        dropped = sum(part["dropped"].values())
        rows.append(
            [
                name.replace("_", " "),
                f"{100 * part['rate']:.0f}\u00a0%",
                f"{100 * part['share_of_tokens']:.0f}\u00a0%",
                f"{part['examples']:,}",
                f"{part['rows']:,}",
                f"{part['tokens']:,}",
                f"{100 * part['loss_tokens'] / max(part['tokens'], 1):.0f}\u00a0%",
                f"{100 * part['fill']:.0f}\u00a0%",
                f"{dropped:,}",
            ]
        )
    head = ["Component", "Rate", "Share of tokens", "Examples", "Rows", "Tokens", "Trained on", "Fill", "Too long"]
    return table(head, rows, caption=f"{title_of(stage)}: rows of {card['context']} tokens")
