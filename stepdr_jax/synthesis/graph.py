"""Knowledge graphs as arrays: degrees, seeds, breadth-first subgraphs, and walks along hyperlinks.

The paper (section 3.2.1) starts from entities of degree 3-10, grows subgraphs of 10-40 nodes breadth-first, and keeps
super-nodes as leaves: an edge may lead to one, none is followed out of one. Its document walks (section 3.2.2) follow
links without a target. Every draw is a function of the generator that the caller passes.
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from urllib.parse import urldefrag

import numpy as np

from stepdr_jax.records import Document, Triple


@dataclasses.dataclass(frozen=True)
class Graph:
    """An undirected multigraph in CSR form. N nodes, E stored neighbour entries (two per neighbouring pair).

    Attributes:
        names: node names, sorted; a node is its position in this tuple.
        offsets_N1: int64; neighbours of node i are neighbours_E[offsets_N1[i] : offsets_N1[i + 1]].
        neighbours_E: int32, sorted within a node, each neighbour once, never the node itself.
        degrees_N: int64, edges that touch a node; parallel edges count each, a self-loop counts twice.
    """

    names: tuple[str, ...]
    offsets_N1: np.ndarray
    neighbours_E: np.ndarray
    degrees_N: np.ndarray

    @functools.cached_property
    def index(self) -> dict[str, int]:
        return {name: node for node, name in enumerate(self.names)}

    def neighbours(self, node: int) -> np.ndarray:
        return self.neighbours_E[self.offsets_N1[node] : self.offsets_N1[node + 1]]

    def seeds(self, degree: tuple[int, int] = (3, 10)) -> np.ndarray:
        """Nodes whose degree lies in the closed range: entities neither obscure nor generic."""
        return np.flatnonzero((self.degrees_N >= degree[0]) & (self.degrees_N <= degree[1]))

    def super_nodes(self, super_node_degree: int = 1000) -> np.ndarray:
        return np.flatnonzero(self.degrees_N > super_node_degree)


def from_edges(edges: Iterable[tuple[str, str]]) -> Graph:
    """Builds a graph; every given edge counts towards the degrees."""
    edges = list(edges)
    names = tuple(sorted({name for edge in edges for name in edge}))
    index = {name: node for node, name in enumerate(names)}
    ends = np.array([(index[head], index[tail]) for head, tail in edges], dtype=np.int64).reshape(-1, 2)
    degrees = np.bincount(ends.ravel(), minlength=len(names)).astype(np.int64)
    both = np.concatenate([ends, ends[:, ::-1]])
    both = np.unique(both[both[:, 0] != both[:, 1]], axis=0)  # sorted by source, then by neighbour
    counts = np.bincount(both[:, 0], minlength=len(names))
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return Graph(names, offsets, both[:, 1].astype(np.int32), degrees)


def from_triples(triples: Iterable[Triple]) -> Graph:
    """Builds the graph of entities; literals are no nodes.

    A fact that is stated from both ends (A neighbour B, B neighbour A) is one edge.
    """
    facts = {(t.relation, *sorted((t.head, t.tail))) for t in triples if t.tail_is_entity}
    return from_edges((head, tail) for _, head, tail in sorted(facts))


@dataclasses.dataclass(frozen=True)
class Subgraph:
    """A connected sample. `nodes[0]` is the seed; `edges` are pairs of nodes, each once, smaller node first."""

    nodes: tuple[int, ...]
    edges: tuple[tuple[int, int], ...]


def sample_subgraph(
    graph: Graph,
    seed: int,
    rng: np.random.Generator,
    *,
    nodes: tuple[int, int] = (10, 40),
    super_node_degree: int = 1000,
    fan_out: int = 8,
) -> Subgraph | None:
    """Grows a subgraph breadth-first from a node.

    Args:
        seed: the start; a super-node is refused (ValueError), because it would be expanded.
        nodes: closed range of sizes; the target is drawn from it.
        super_node_degree: nodes above it are leaves: they keep only the edge they were reached by.
        fan_out: new nodes that one node adds at most, drawn at random, so that one hub does not fill the sample.

    Returns:
        The sample, or None when what is reachable is smaller than the range.
    """
    if graph.degrees_N[seed] > super_node_degree:
        raise ValueError(f"node {graph.names[seed]!r} has degree {graph.degrees_N[seed]} > {super_node_degree}")
    target = int(rng.integers(nodes[0], nodes[1] + 1))
    order, tree = [int(seed)], []
    seen = {int(seed)}
    for node in order:  # grows while it is read: a queue
        if graph.degrees_N[node] > super_node_degree:
            continue
        fresh = [int(n) for n in graph.neighbours(node) if int(n) not in seen]
        room = min(fan_out, target - len(order))
        for neighbour in rng.permutation(fresh)[:room] if fresh else ():
            seen.add(int(neighbour))
            order.append(int(neighbour))
            tree.append((node, int(neighbour)))
        if len(order) >= target:
            break
    if len(order) < nodes[0]:
        return None
    inner = {node for node in order if graph.degrees_N[node] <= super_node_degree}
    induced = {(a, int(b)) for a in inner for b in graph.neighbours(a) if int(b) in inner}
    edges = {(min(edge), max(edge)) for edge in induced.union(tree)}
    return Subgraph(tuple(order), tuple(sorted(edges)))


def triples_within(graph: Graph, subgraph: Subgraph, triples: Iterable[Triple]) -> list[Triple]:
    """The facts of a sample, in the given order: those along its edges, and the literals of its nodes."""
    inside = {graph.names[node] for node in subgraph.nodes}
    edges = {frozenset((graph.names[a], graph.names[b])) for a, b in subgraph.edges}
    return [t for t in triples if (frozenset((t.head, t.tail)) in edges if t.tail_is_entity else t.head in inside)]


def page_links(documents: Sequence[Document]) -> dict[str, tuple[str, ...]]:
    """URL -> the URLs it links to, in page order; links that leave the documents or point to themselves are dropped."""
    urls = {document.url for document in documents}
    links = {}
    for document in documents:
        targets = dict.fromkeys(urldefrag(link.url).url for link in document.links)
        links[document.url] = tuple(url for url in targets if url in urls and url != document.url)
    return links


def random_walk(
    links: Mapping[str, Sequence[str]],
    start: str,
    rng: np.random.Generator,
    *,
    max_hops: int = 12,
    min_pages: int = 4,
) -> list[str] | None:
    """Follows links at random, without a target and without visiting a page twice.

    Args:
        links: page -> linked pages, as `hyperlinks` gives.
        max_hops: links followed at most; a page whose links were all seen ends the walk earlier.
        min_pages: shorter walks are None.

    Returns:
        The pages in the order of the visit, `start` first.
    """
    path = [start]
    while len(path) <= max_hops:
        fresh = [url for url in links.get(path[-1], ()) if url not in path]
        if not fresh:
            break
        path.append(fresh[int(rng.integers(len(fresh)))])
    return path if len(path) >= min_pages else None
