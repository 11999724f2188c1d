"""Edges of the knowledge graph that a two-hop question may use: inside a sampled subgraph, and found by a search."""

from ml_collections import ConfigDict

from stepdr_jax.agent import runner
from stepdr_jax.records import Triple
from stepdr_jax.synthesis.scripted import deep_search, sentences
from stepdr_jax.synthesis.scripted.knowledge import LANGS, Fact, Knowledge
from tools_env.client import ToolResult, ToolsClient

VERIFY_BATCH = 2  # edges checked by one tool call: what fits into one observation


def hop_pairs(config: ConfigDict, known: Knowledge, triples: list[Triple]) -> dict[str, list[tuple[Fact, Fact]]]:
    """Country -> (clue, asked) pairs whose edges lie in the subgraph around the country (paper section 3.2.1)."""
    pairs = {}
    for country, relations in deep_search.subgraph_relations(
        known,
        triples,
        seed_degree=tuple(config.synthesis.seed_degree),
        nodes=tuple(config.synthesis.subgraph_nodes),
        super_node_degree=config.synthesis.super_node_degree,
        seed=config.data_seed,
    ).items():
        pairs[country] = [
            (known.facts[country, clue, lang], known.facts[country, asked, lang])
            for lang in LANGS
            for clue in deep_search.CLUES[lang]
            for asked in deep_search.ASKED
            if clue != asked and {clue, asked} <= relations and {clue, asked} <= set(known.relations(country, lang))
        ]
    return pairs


async def verified_pairs(client: ToolsClient, known: Knowledge, pairs: dict[str, list]) -> tuple[dict[str, list], int]:
    """Keeps the pairs of which both edges are found by a search; returns them and the number of edges that failed."""
    wanted: dict[tuple, tuple[str, tuple]] = {}  # edge -> query, fact
    for listed in pairs.values():
        for clue, asked in listed:
            wanted[clue, "clue"] = deep_search.clue_phrase(clue.relation, clue.value, clue.lang), _stated(clue.sentence)
            wanted[asked, "asked"] = deep_search.search_query(asked, known), _stated(asked.sentence)
    edges = list(wanted)
    supported: set[tuple] = set()
    session = await client.open_session("verify-edges")
    try:
        batches = [edges[start : start + VERIFY_BATCH] for start in range(0, len(edges), VERIFY_BATCH)]

        async def search(numbered: tuple[int, list]) -> ToolResult:
            number, batch = numbered
            queries = list(dict.fromkeys(wanted[edge][0] for edge in batch))
            return await session.call("batch_web_surfer", {"queries": queries, "topk": 2}, call_id=f"edges-{number}")

        async def keep(numbered: tuple[int, list], result: ToolResult) -> None:
            shown = {_stated(source.text) for source in result.sources if source.authority == 2}
            supported.update(edge for edge in numbered[1] if wanted[edge][1] in shown)

        await runner.run_all(dict(enumerate(enumerate(batches))), search, keep, concurrency=16)
    finally:
        await session.close()
    kept = {
        country: [(c, a) for c, a in listed if (c, "clue") in supported and (a, "asked") in supported]
        for country, listed in pairs.items()
    }
    return kept, len(edges) - len(supported)


def _stated(text: str) -> tuple | None:
    statement = sentences.parse_statement(text)
    return statement.fact if statement else None
