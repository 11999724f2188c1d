"""Seeds, subgraphs and walks: the paper's rules, on small graphs and on a real one."""

from collections import deque
from pathlib import Path

import numpy as np
import pytest

from stepdr_jax.records import Document, Link, Triple
from stepdr_jax.synthesis import graph

WIKISPEEDIA = Path(__file__).parents[2].parent / "shared" / "data" / "wikispeedia" / "links.tsv"


@pytest.fixture(scope="module")
def wikispeedia():
    if not WIKISPEEDIA.is_file():
        pytest.skip(f"{WIKISPEEDIA} is absent: the Wikispeedia links are not part of the repository")
    rows = WIKISPEEDIA.read_text().splitlines()
    return graph.from_edges(tuple(row.split("\t")) for row in rows if row and not row.startswith("#"))


def connected(subgraph: graph.Subgraph) -> bool:
    links = {node: set() for node in subgraph.nodes}
    for a, b in subgraph.edges:
        links[a].add(b)
        links[b].add(a)
    seen, queue = {subgraph.nodes[0]}, deque(subgraph.nodes[:1])
    while queue:
        for node in links[queue.popleft()] - seen:
            seen.add(node)
            queue.append(node)
    return seen == set(subgraph.nodes)


def star(leaves: int, chain: int = 0) -> graph.Graph:
    edges = [("hub", f"leaf{i:04}") for i in range(leaves)]
    return graph.from_edges(edges + [(f"chain{i:02}", f"chain{i + 1:02}") for i in range(chain)] + [("hub", "chain00")])


def test_neighbours_and_degrees_count_parallel_edges_and_ignore_self_loops_as_neighbours():
    built = graph.from_edges([("a", "b"), ("b", "a"), ("b", "c"), ("c", "c")])
    assert built.names == ("a", "b", "c")
    assert built.degrees_N.tolist() == [2, 3, 3]
    assert [built.neighbours(node).tolist() for node in range(3)] == [[1], [0, 2], [1]]


def test_a_fact_stated_from_both_ends_is_one_edge_and_literals_are_no_nodes():
    triples = [
        Triple(head="aut", relation="neighbour", tail="hun", tail_is_entity=True),
        Triple(head="hun", relation="neighbour", tail="aut", tail_is_entity=True),
        Triple(head="aut", relation="capital", tail="city:vienna", tail_is_entity=True),
        Triple(head="aut", relation="population", tail="8527230"),
    ]
    built = graph.from_triples(triples)
    assert dict(zip(built.names, built.degrees_N.tolist(), strict=True)) == {"aut": 2, "city:vienna": 1, "hun": 1}


def test_an_empty_graph_has_no_seeds():
    assert graph.from_edges([]).seeds().tolist() == []


def test_real_links_have_the_known_seeds_and_super_nodes(wikispeedia):
    assert len(wikispeedia.seeds((3, 10))) == 570
    assert len(wikispeedia.super_nodes(1000)) == 4


def test_every_sample_of_a_real_graph_is_connected_and_of_the_right_size(wikispeedia):
    supers = set(wikispeedia.super_nodes(1000).tolist())
    rng = np.random.default_rng(0)
    met = 0
    for seed in wikispeedia.seeds((3, 10)):
        found = graph.sample_subgraph(wikispeedia, int(seed), rng)
        assert found is not None
        assert 10 <= len(found.nodes) <= 40
        assert len(set(found.nodes)) == len(found.nodes)
        assert connected(found)
        for node in supers.intersection(found.nodes):
            met += 1
            assert sum(node in edge for edge in found.edges) == 1, "a super-node is a leaf"
    assert met > 0, "some samples reach a super-node"


def test_a_super_node_is_reached_but_not_expanded():
    built = star(2000, chain=12)
    found = graph.sample_subgraph(built, built.index["chain00"], np.random.default_rng(0), nodes=(13, 14))
    assert {built.names[node] for node in found.nodes} >= {"hub", "chain12"}
    assert not any(built.names[node].startswith("leaf") for node in found.nodes)


def test_a_super_node_is_never_a_seed():
    built = star(2000)
    with pytest.raises(ValueError, match="'hub' has degree 2001"):
        graph.sample_subgraph(built, built.index["hub"], np.random.default_rng(0))


def test_one_node_adds_at_most_the_fan_out():
    built = star(100)
    found = graph.sample_subgraph(built, built.index["hub"], np.random.default_rng(0), nodes=(9, 9), fan_out=8)
    assert len(found.nodes) == 9
    assert graph.sample_subgraph(built, built.index["hub"], np.random.default_rng(0), nodes=(10, 40), fan_out=8) is None


def test_a_sample_is_a_function_of_its_generator(wikispeedia):
    seed = int(wikispeedia.seeds()[7])
    first, second = (graph.sample_subgraph(wikispeedia, seed, np.random.default_rng(5)) for _ in range(2))
    assert first == second


def test_triples_within_a_sample_are_its_edges_and_its_nodes_literals():
    triples = [
        Triple(head="a", relation="neighbour", tail="b", tail_is_entity=True),
        Triple(head="b", relation="capital", tail="c", tail_is_entity=True),
        Triple(head="a", relation="population", tail="5"),
        Triple(head="c", relation="population", tail="6"),
    ]
    built = graph.from_triples(triples)
    inside = graph.Subgraph((0, 1), ((0, 1),))
    assert graph.triples_within(built, inside, triples) == [triples[0], triples[2]]


def page(url: str, *targets: str) -> Document:
    links = [Link(anchor=target, url=target) for target in targets]
    return Document(id=url, url=url, title=url, text="", lang="en", source="world", links=links)


def test_walks_follow_links_without_repeats_and_stop_at_the_limit():
    ring = {f"p{i}": (f"p{(i + 1) % 30}", f"p{(i + 2) % 30}") for i in range(30)}
    path = graph.random_walk(ring, "p0", np.random.default_rng(1), max_hops=12)
    assert len(path) == 13 and len(set(path)) == 13
    assert all(after in ring[before] for before, after in zip(path, path[1:], strict=False))


def test_walks_that_meet_too_few_pages_are_dropped():
    assert graph.random_walk({"a": ("b",), "b": ("c",)}, "a", np.random.default_rng(0)) is None
    assert graph.random_walk({"a": ("b",), "b": ("c",)}, "a", np.random.default_rng(0), min_pages=3) == ["a", "b", "c"]


def test_links_that_leave_the_documents_are_no_edges():
    links = graph.page_links([page("a", "b#part", "a", "dead", "b"), page("b")])
    assert links == {"a": ("b",), "b": ()}
