"""Shuffled sequences that keep every count of two symbols in a row: what composition alone can say is kept, order is
not."""

import numpy as np


def shuffled(ids: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """One of all sequences with the same first and last symbol and the same number of every pair of neighbours, each as
    likely as the others (Altschul and Erickson, 1985).

    A sequence is a walk over the graph whose edges are its pairs. A walk over all edges is given by the order in which
    the edges of each symbol are used; it ends nowhere too early just where the last edges of all symbols but the final
    one lead to that. Such a set of last edges is drawn first, the other edges are in any order.

    Args:
        ids: uint8 [n].
    """
    if ids.size < 4:
        return ids.copy()
    symbols, codes = np.unique(ids, return_inverse=True)
    final = int(codes[-1])
    followers = [codes[1:][codes[:-1] == symbol] for symbol in range(symbols.size)]
    last = _last_edges(followers, final, random)
    orders: list[list[int]] = []
    for symbol, behind in enumerate(followers):
        order = behind.copy()
        if symbol != final:
            order = np.delete(order, np.flatnonzero(order == last[symbol])[0])
        random.shuffle(order)
        order = order.tolist() + ([last[symbol]] if symbol != final else [])
        orders.append(order[::-1])
    walk = [int(codes[0])]
    for _ in range(ids.size - 1):
        walk.append(orders[walk[-1]].pop())
    return symbols[np.array(walk)]


def _last_edges(followers: list[np.ndarray], final: int, random: np.random.Generator) -> list[int]:
    """The symbol to which the last edge of each leads: a tree with the final one as its root, each tree as likely as it
    has ways to be made of the pairs (Wilson, 1996: random walks without their loops)."""
    last = [-1] * len(followers)
    inside = [symbol == final for symbol in range(len(followers))]
    for start in range(len(followers)):
        at = start
        while not inside[at]:
            last[at] = int(followers[at][random.integers(followers[at].size)])
            at = last[at]
        at = start
        while not inside[at]:
            inside[at] = True
            at = last[at]
    return last
