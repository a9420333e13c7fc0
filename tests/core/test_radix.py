"""The radix tree: compact, whatever is put in and taken out; what nodes hold is split and joined with their edges."""

from __future__ import annotations

import random

import pytest

from peftx.toolkits.serving.radix import Node, RadixTree


def tree_of(*texts: str) -> RadixTree[list[str]]:
    """Nodes hold the letters of their edges, as far as somebody gave them."""

    def split(held: list[str], tokens: int) -> list[str]:
        first, held[:] = held[:tokens], held[tokens:]
        return first

    def join(held: list[str], child: list[str]) -> None:
        child[:0] = held

    tree = RadixTree[list[str]](list, split=split, join=join)
    for text in texts:
        put(tree, text)
    return tree


def put(tree: RadixTree[list[str]], text: str) -> Node[list[str]]:
    node = tree.insert([ord(letter) for letter in text])
    node.data[:] = node.data or text[node.depth - len(node.edge) :]
    return node


def shape(node: Node[list[str]]) -> dict[str, object]:
    return {"".join(child.data): shape(child) for child in node.children.values()}


def sound(tree: RadixTree[list[str]]) -> None:
    for node in tree.nodes():
        assert node.above is not None
        assert node.above.children[node.edge[0]] is node
        assert node.depth == node.above.depth + len(node.edge)
        assert "".join(map(chr, node.edge)) == "".join(node.data)


def test_texts_that_begin_alike_part_where_they_differ() -> None:
    tree = tree_of("tea", "ten", "te", "so")
    assert shape(tree.root) == {"te": {"a": {}, "n": {}}, "so": {}}
    assert ["".join(node.data) for node in tree.nodes()] == ["te", "a", "n", "so"]
    sound(tree)


def test_what_is_known_of_a_text() -> None:
    tree = tree_of("tea", "ten", "te")

    def known(text: str) -> tuple[list[str], int]:
        way, matched = tree.walk([ord(letter) for letter in text])
        return ["".join(node.data) for node in way], matched

    assert known("teas") == (["", "te", "a"], 3)
    assert known("to") == (["", "te"], 1)
    assert known("te") == (["", "te"], 2)
    assert known("x") == ([""], 0)
    assert known("") == ([""], 0)


def test_a_node_between_two_goes_into_the_next() -> None:
    tree = tree_of("te", "tea")
    inner, leaf = tree.nodes()
    tree.remove(inner)
    assert shape(tree.root) == {"tea": {}}
    tree.remove(leaf)
    assert shape(tree.root) == {}


def test_nodes_that_cannot_go() -> None:
    tree = tree_of("tea", "ten")
    for node in (tree.root, next(tree.nodes())):
        with pytest.raises(ValueError, match="cannot go"):
            tree.remove(node)


def test_any_order_of_texts_and_removals() -> None:
    draw = random.Random(0)
    tree, known = tree_of(), set[str]()
    for _ in range(300):
        text = "".join(draw.choices("ab", k=draw.randint(1, 12)))
        assert put(tree, text) is put(tree, text)
        known.add(text)
        if draw.random() < 0.5:
            tree.remove(draw.choice([node for node in tree.nodes() if len(node.children) < 2]))
        sound(tree)
    assert len(tree_of(*sorted(known)).root.children) == 2


def test_a_copy_is_of_its_own() -> None:
    tree = tree_of("tea", "ten")
    twin = tree.copied(list)
    assert shape(twin.root) == shape(tree.root)
    put(twin, "so")
    twin.remove(next(twin.root.children[ord("t")].children.values().__iter__()))
    assert shape(tree.root) == {"te": {"a": {}, "n": {}}}
    assert shape(twin.root) == {"te": {"n": {}}, "so": {}}
    sound(twin)
