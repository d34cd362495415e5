"""Graph pictures: where nodes stand, what is coloured, and the replay."""

import networkx as nx
import pytest

from dlmlib import show


@pytest.fixture
def two():
    return nx.DiGraph([("a", "b"), ("b", "c"), ("b", "x"), ("s", "t")])


def test_layers_count_the_distance_from_each_root(two):
    places = show.layers(two, ["a", "s"])
    assert {node: x for node, (x, _) in places.items()} == {
        "a": 0, "b": 1, "c": 2, "x": 2, "s": 0, "t": 1,
    }  # fmt: skip
    assert len(set(places.values())) == 6
    first = min(y for node, (_, y) in places.items() if node in "abcx")
    assert all(places[node][1] < first for node in "st")


def test_a_node_out_of_reach_is_named(two):
    with pytest.raises(ValueError, match=r"\['s', 't'\]"):
        show.layers(two, ["a"])


def test_a_picture_names_every_node_and_note(two):
    ax = show.graph(
        two, show.layers(two, ["a", "s"]), title="found", colors={"b": show.DIFFUSION},
        notes={"c": "goal"},
    )  # fmt: skip
    words = [text.get_text() for text in ax.texts]
    assert sorted(words) == sorted([*two, "goal"])
    assert ax.get_title(loc="left") == "found" or ax.get_title() == "found"


def test_a_replay_has_a_frame_a_step_and_escapes_text(two):
    places = show.layers(two, ["a", "s"])
    steps = [{}, {"b": show.DIFFUSION}]
    widget = show.graph_scrubber(two, places, steps, ["start", "b < c"])
    assert len(widget.frames) == 2
    assert show.DIFFUSION not in widget.frames[0] and show.DIFFUSION in widget.frames[1]
    assert "b &lt; c" in widget.frames[1]
    assert widget.frames[0].count("<line") == 4
    assert widget.frames[0].count("<circle") == 6
    with pytest.raises(ValueError, match="captions"):
        show.graph_scrubber(two, places, steps, ["start"])
