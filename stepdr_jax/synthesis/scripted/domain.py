"""The domain of synthesis: tasks, expert policies and synthetic documents about countries of the offline web.

The rest of `stepdr_jax.synthesis` reaches countries through `CountryDomain` only.
"""

import dataclasses
import random
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from ml_collections import ConfigDict

from stepdr_jax import files
from stepdr_jax.records import Document, Task, Triple
from stepdr_jax.synthesis.experts import EpisodeJob
from stepdr_jax.synthesis.scripted import deep_search, edges, knowledge, synthetic_documents, tasks
from stepdr_jax.synthesis.scripted.expert import ScriptedExpert
from stepdr_jax.synthesis.scripted.style import Style, draw_style
from tools_env.client import ToolsClient

INJECTED_ERROR_SHARE = 0.2  # tasks that also get an episode with an injected error; cleaning keeps the exact share
UNAVAILABLE_HOST = "flaky.test"  # answers 503 in the offline web
WALK_CHARS = 0.75  # characters of opened pages for a token of an episode: half of it is pages, 0.6 tokens a character


class CountryDomain:
    """Everything that synthesis knows about countries, from a built offline web.

    Attributes:
        knowledge: the facts, the split and the names.
        answer_fault: see `cleaning.drop_reason`.

    Raises:
        UserError: a file of the offline web is absent or broken.
    """

    answer_fault = staticmethod(tasks.answer_fault)

    def __init__(self, config: ConfigDict, world_dir: Path) -> None:
        self._config = config
        self.knowledge = knowledge.load_knowledge(
            world_dir, heldout_share=config.offline_web.heldout_share, seed=config.data_seed
        )
        hosts = files.read_json(world_dir / "sites.json")["hosts"]
        self._authority = {name: int(site.get("authority", 0)) for name, site in hosts.items()}

    async def draw_tasks(
        self, client: ToolsClient, documents: list[Document], triples: list[Triple]
    ) -> tuple[list[tasks.DrawnTask], dict[str, int]]:
        """Draws all tasks; returns them and the numbers of verified and unverified edges of the graph."""
        config, known = self._config, self.knowledge
        hops, unverified = await edges.verified_pairs(client, known, edges.hop_pairs(config, known, triples))
        walks = deep_search.link_walks(
            known,
            documents,
            max_chars=int(WALK_CHARS * config.agent.max_episode_tokens),
            page_chars=config.tools.max_observation_chars,
            seed=config.data_seed,
        )
        drawn = tasks.draw_tasks(
            known,
            tasks_per_entity=config.synthesis.tasks_per_entity,
            heldout_tasks=config.synthesis.heldout_tasks,
            kind_weights=config.synthesis.kind_weights.to_dict(),
            chinese_share=config.synthesis.chinese_share,
            seed=config.data_seed,
            as_of=config.offline_web.as_of,
            hops=hops,
            walks=walks,
        )
        return drawn, {"verified": sum(map(len, hops.values())), "unverified": unverified}

    def episode_jobs(self, usable: list[tasks.DrawnTask]) -> list[EpisodeJob]:
        """A clean episode for every training task, and for some a second one with an injected error to recover from."""
        jobs = []
        for item in usable:
            if item.task.split != "train":
                continue
            rng = random.Random(f"style {self._config.data_seed} {item.task.id}")
            style = draw_style(item.task, rng, error_share=INJECTED_ERROR_SHARE)
            jobs.append(EpisodeJob(item.task, item.rubric_set, dataclasses.replace(style, injected_error="")))
            if style.injected_error:
                jobs.append(EpisodeJob(item.task, item.rubric_set, style, variant=style.injected_error))
        return jobs

    def expert(self, task: Task, style: Style, seed: int) -> ScriptedExpert:
        """The scripted expert of a task, with addresses that look right and cannot be read."""
        url = self.knowledge.pages[task.entity, task.lang][0].url
        bad_urls = {
            "dead_link": url.rstrip("/") + "/history",
            "unavailable": f"http://{UNAVAILABLE_HOST}{urlsplit(url).path}",
        }
        return ScriptedExpert(task, self._authority, style, seed=seed, bad_urls=bad_urls)

    def document_rows(self) -> Iterator[dict]:
        """The synthetic documents."""
        settings = self._config.synthesis
        return synthetic_documents.document_rows(
            self.knowledge,
            copies=settings.document_copies,
            chinese_share=settings.chinese_share,
            seed=self._config.data_seed,
        )
