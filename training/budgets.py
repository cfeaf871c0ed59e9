"""Budgets that a model is trained for, which nothing but training needs."""

from __future__ import annotations

from typing import Any

from ..configuration_metaembed import check_count


def check_budgets(
    budgets: Any, num_query_tokens: int, num_document_tokens: int, complete: bool = True
) -> list[list[int]]:
    """Return `budgets`, `(r_q, r_c)` pairs with the smallest first, as lists, checked to be usable for training.

    Raises:
        TypeError: If a budget is not a pair of whole numbers.
        ValueError: If a number is out of range, the budgets are not nested and growing, or not `complete`: up to all.
    """
    if not isinstance(budgets, (list, tuple)) or not budgets:
        raise TypeError(f"budgets must be a non-empty list of (r_q, r_c) pairs, got {budgets!r}.")
    pairs = []
    for budget in budgets:
        if not isinstance(budget, (list, tuple)) or len(budget) != 2:
            raise TypeError(f"each budget must be a pair (r_q, r_c), got {budget!r}.")
        r_q = check_count(f"r_q of budget {tuple(budget)}", budget[0], num_query_tokens)
        pairs.append([r_q, check_count(f"r_c of budget {tuple(budget)}", budget[1], num_document_tokens)])
    steps = list(zip(pairs, pairs[1:], strict=False))
    problems = [f"{large} is listed twice (not strictly growing)" for small, large in steps if large == small]
    problems += [f"{b} does not contain {a} (not nested)" for a, b in steps if b[0] < a[0] or b[1] < a[1]]
    full = [num_query_tokens, num_document_tokens]
    if complete and pairs[-1] != full:
        problems.append(f"the last is {pairs[-1]}, but must be the full size {full}")
    if problems:
        raise ValueError(f"budgets {pairs} cannot be used: {'; '.join(problems)}.")
    return pairs
