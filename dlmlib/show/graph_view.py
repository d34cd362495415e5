"""Graphs whose nodes are coloured as they are written: one picture, or a replay."""

from collections.abc import Hashable, Mapping, Sequence
from html import escape

import networkx as nx
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from dlmlib.errors import check
from dlmlib.show.html_view import Scrubber
from dlmlib.show.palette import FAINT, INK, PAPER, PROMPT, ink_on

Places = dict[Hashable, tuple[float, float]]


def layers(graph: nx.Graph, roots: Sequence[Hashable]) -> Places:
    """Places for the nodes: each root on the left, its distance to the right.

    The graphs of several roots stand below one another.

    Args:
        graph: its parts must be reachable from the roots.
        roots: where each part begins.
    Raises:
        ValueError: a node that no root reaches.

    Introduced in notebook 14.
    """
    places, top = {}, 0.0
    for root in roots:
        distance = nx.single_source_shortest_path_length(graph, root)
        columns = {}
        for node, depth in distance.items():
            columns.setdefault(depth, []).append(node)
        height = max(map(len, columns.values()))
        for depth, nodes in columns.items():
            for i, node in enumerate(nodes):
                places[node] = (float(depth), top - i)
        top -= height + 0.4
    lost = [node for node in graph if node not in places]
    check(not lost, "roots", list(roots), f"roots that also reach {lost}")
    return places


def graph(
    graph: nx.Graph,
    places: Places,
    *,
    title: str,
    colors: Mapping[Hashable, object] | None = None,
    edge_colors: Mapping[tuple, object] | None = None,
    notes: Mapping[Hashable, str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw a graph; arrows if it is directed.

    Args:
        graph: nodes by name.
        places: of the nodes, see `layers`.
        title: the finding.
        colors: of nodes; the others are white.
        edge_colors: of edges; the others are faint.
        notes: a word under a node.
        ax: where to draw; None for a new figure.

    Introduced in notebook 14.
    """
    colors, edge_colors = colors or {}, edge_colors or {}
    if ax is None:
        rows = (
            1 + max(y for _, y in places.values()) - min(y for _, y in places.values())
        )
        _, ax = plt.subplots(
            figsize=(plt.rcParams["figure.figsize"][0], 1 + 0.6 * rows)
        )
    ax.set_title(title)
    ax.axis("off")
    faces = [colors.get(node, PAPER) for node in graph]
    edges = [edge_colors.get(edge, FAINT) for edge in graph.edges]
    nx.draw_networkx_nodes(
        graph, places, node_color=faces, edgecolors=PROMPT, node_size=330, ax=ax
    )
    nx.draw_networkx_edges(
        graph, places, edge_color=edges, width=1.8, node_size=330, ax=ax
    )
    for node, face in zip(graph, faces, strict=True):
        ax.text(
            *places[node], str(node), ha="center", va="center", size=9,
            color=ink_on(face),
        )  # fmt: skip
    for node, note in (notes or {}).items():
        ax.annotate(
            note, places[node], (0, -17), textcoords="offset points", ha="center",
            size=8, color=INK,
        )  # fmt: skip
    ax.margins(0.08)
    return ax


def graph_scrubber(
    graph: nx.Graph,
    places: Places,
    steps: Sequence[Mapping[Hashable, str]],
    captions: Sequence[str],
) -> Scrubber:
    """Replay how nodes are coloured, step by step; made beforehand as drawings in text.

    Args:
        graph, places: as for `graph`.
        steps: colours of nodes after each step, the start first.
        captions: a line of text for each of them.
    Raises:
        ValueError: not one caption a step.

    Introduced in notebook 14.
    """
    same = len(steps) == len(captions)
    check(same, "captions", len(captions), f"one a step, {len(steps)}")
    frames = [
        _svg(graph, places, colors, caption)
        for colors, caption in zip(steps, captions, strict=True)
    ]
    return Scrubber(frames)


def _svg(graph, places: Places, colors: Mapping, caption: str) -> str:
    """One frame: lines, discs and names, readable without their colours."""
    scale, margin = 46, 24
    left = min(x for x, _ in places.values())
    top = max(y for _, y in places.values())
    at = {
        node: (margin + (x - left) * scale, margin + (top - y) * scale * 0.8)
        for node, (x, y) in places.items()
    }
    width = max(x for x, _ in at.values()) + margin
    height = max(y for _, y in at.values()) + margin
    parts = []
    for a, b in graph.edges:
        (x1, y1), (x2, y2) = at[a], at[b]
        parts.append(
            f'<line x1="{x1:.0f}" y1="{y1:.0f}" x2="{x2:.0f}" y2="{y2:.0f}" '
            f'stroke="{FAINT}" stroke-width="2"/>'
        )
    for node, (x, y) in at.items():
        face = colors.get(node, PAPER)
        parts.append(
            f'<circle cx="{x:.0f}" cy="{y:.0f}" r="13" fill="{face}" '
            f'stroke="{PROMPT}"/><text x="{x:.0f}" y="{y + 4:.0f}" '
            f'text-anchor="middle" font-size="12" fill="{ink_on(face)}">'
            f"{escape(str(node))}</text>"
        )
    return (
        f'<div style="background:{PAPER};color:{INK};padding:6px">'
        f'<svg role="img" aria-label="{escape(caption)}" width="{width:.0f}" '
        f'height="{height:.0f}">{"".join(parts)}</svg>'
        f'<pre style="margin:0;background:{PAPER};color:{INK}">{escape(caption)}</pre>'
        "</div>"
    )
