"""The data of the run: tasks, episodes, synthetic documents, and the packed training data."""

from collections.abc import Mapping

from stepdr_jax.pages import plots
from stepdr_jax.pages.wording import KIND_TITLES, LANG_TITLES, component_title, count_of, mixture_table
from stepdr_jax.reporting.collect import Run
from stepdr_jax.reporting.sections.wording import Section
from stepdr_jax.runtime.stages import title_of


def data_section(run: Run) -> Section:
    found = run.data
    trajectories = found.get("trajectories")
    section: Section = {
        "present": "tasks" in found or "trajectories" in found,
        "prepared": "prepared" in found,
        "sentence": _summary(found),
        "figures": [],
        "tables": [],
        "notes": [],
    }
    if found.get("tasks"):
        section["figures"].append(_task_chart(found["tasks"]))
    if trajectories:
        kept = trajectories["kept_by_capability"]
        section["figures"].append(_count_chart(kept, "Teacher episodes kept, by capability", "episodes"))
        if trajectories["dropped"]:
            reasons = trajectories["dropped_by_reason"]
            section["figures"].append(_count_chart(reasons, "Teacher episodes dropped, by reason", "episodes"))
    if found.get("synthetic_documents"):
        title = "Synthetic documents by mixture component"
        section["figures"].append(_count_chart(found["synthetic_documents"], title, "documents"))
    for stage, card in found.get("prepared", {}).get("stages", {}).items():
        caption = f"{title_of(stage)}: sequences of {card['seq_len']} tokens"
        section["tables"].append(mixture_table(card["components"], caption=caption))
    copies = found.get("card", {}).get("trajectories", {}).get("renamed copies")
    if copies:
        section["notes"].append(
            f"Training also reads {copies:,} copies of the kept episodes in which entities are renamed."
        )
    if section["prepared"]:
        section["notes"].append(
            "Rate: share of the tokens that training draws, as configured. Share of tokens: share of the tokens on "
            "disk. Trained on: tokens in the loss. Fill: used positions of a packed sequence. Dropped: examples that "
            "were too long or had no tokens to train on, duplicates, and rows with evaluation questions."
        )
    return section


def _summary(found: Mapping) -> str:
    """One sentence on what the run has made so far."""
    counts, tasks, trajectories = [], found.get("tasks", []), found.get("trajectories")
    if found.get("documents"):
        counts.append(count_of(found["documents"], "document"))
    if tasks:
        heldout = sum(row["count"] for row in tasks if row["split"] == "heldout")
        counts.append(f"{count_of(sum(row['count'] for row in tasks), 'task')}, {heldout:,} of them held out by entity")
    if trajectories:
        episodes = count_of(trajectories["kept"] + trajectories["dropped"], "teacher episode")
        counts.append(f"{episodes}, {trajectories['kept']:,} kept")
    if found.get("synthetic_documents"):
        counts.append(count_of(sum(found["synthetic_documents"].values()), "synthetic document"))
    if found.get("tokenizer"):
        counts.append(f"a byte-level BPE tokenizer of {found['tokenizer']:,} tokens trained on them")
    made = f"The run made {'; '.join(counts)}." if counts else ""
    return made + (" Held-out tasks are about entities that no training task asks about." if tasks else "")


def _task_chart(tasks: list[dict]) -> str:
    columns = [(split, lang) for split in ("train", "heldout") for lang in ("en", "zh")]
    names = [f"{'held out' if split == 'heldout' else 'training'}, {LANG_TITLES[lang]}" for split, lang in columns]
    at = {(row["kind"], row["split"], row["lang"]): row["count"] for row in tasks}
    kinds = dict.fromkeys(row["kind"] for row in tasks)
    rows = [(KIND_TITLES.get(kind, kind), [at.get((kind, *column), 0) for column in columns]) for kind in kinds]
    return plots.bar_chart(rows, title="Tasks by kind, language and split", x_label="tasks", names=names)


def _count_chart(counts: Mapping[str, int], title: str, x_label: str) -> str:
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    return plots.bar_chart([(component_title(name), [count]) for name, count in ordered], title=title, x_label=x_label)
