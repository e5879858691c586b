"""Conditions on the columns of a table: comparisons joined by ``and``, ``or`` and ``not``.

A condition is parsed and interpreted here. Unlike ``DataFrame.query``, nothing of it is run as Python.
"""

from __future__ import annotations

import ast
import io
import operator
import re
import tokenize
from collections.abc import Callable
from typing import Any

import pandas as pd

from mixmask.evaluate.names import OLD_KEYS

MAX_LENGTH = 10_000
WORDS = {"&": "and", "|": "or", "~": "not"}
TEXT_OR_NAME = r"'[^']*'|\"[^\"]*\"|`(?P<name>[^`]*)`"
COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
SAID = {
    ast.Call: "a call",
    ast.BinOp: "arithmetic",
    ast.Subscript: "brackets",
    ast.Lambda: "a function",
}


class UnknownColumn(ValueError):
    """A condition on a column that the table does not have."""

    def __init__(self, name: str) -> None:
        super().__init__(f"there is no column '{name}'")
        self.name = name


def holds(table: pd.DataFrame, query: str) -> pd.Series:
    """Of which rows a condition holds.

    Columns are compared with texts, numbers, ``True``, ``False``, lists (``in``, ``not in``) and other columns:
    ``dataset == 'cifar100' and 60 < `knn/top1` <= 70``. ``&``, ``|`` and ``~`` mean ``and``, ``or`` and ``not``.

    Args:
        table: The columns; the condition has names that are no Python identifiers in backticks.
        query: The condition.

    Returns:
        Truth values, one per row.

    Raises:
        UnknownColumn: If it names a column that is not there.
        ValueError: If it is anything but a condition.
    """
    if len(query) > MAX_LENGTH:
        raise ValueError(f"it has {len(query):,} characters; at most {MAX_LENGTH:,}")
    quoted: list[str] = []

    def name_of(match: re.Match[str]) -> str:
        if match["name"] is None:  # a text
            return match[0]
        quoted.append(match["name"])
        return f" quoted_column_{len(quoted) - 1} "

    try:
        tree = ast.parse(_in_words(re.sub(TEXT_OR_NAME, name_of, query)), mode="eval")
        found = _Condition(table, quoted).truth(tree.body)
    except SyntaxError as error:
        raise ValueError(error.msg) from None
    except (RecursionError, MemoryError, tokenize.TokenError):
        raise ValueError("it is nested too deeply, or a bracket is open") from None
    except TypeError as error:
        raise ValueError(f"what cannot be compared: {error}") from None
    return found


def _in_words(query: str) -> str:
    """Write ``&``, ``|`` and ``~`` as words: the symbols would bind more tightly than comparisons."""
    tokens = tokenize.generate_tokens(io.StringIO(query.strip()).readline)
    return tokenize.untokenize(
        (tokenize.NAME, WORDS[token.string]) if token.type == tokenize.OP and token.string in WORDS else token[:2]
        for token in tokens
        if token.type not in (tokenize.COMMENT, tokenize.NL)
    ).strip()


class _Condition:
    def __init__(self, table: pd.DataFrame, quoted: list[str]) -> None:
        self.table, self.quoted = table, quoted

    def truth(self, node: ast.expr) -> pd.Series:
        """Evaluate a condition: one bool per row."""
        if isinstance(node, ast.BoolOp):
            parts = [self.truth(part) for part in node.values]
            joined = parts[0]
            for part in parts[1:]:
                joined = joined & part if isinstance(node.op, ast.And) else joined | part
            return joined
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            return ~self.truth(node.operand)
        if isinstance(node, ast.Compare):
            operands = [node.left, *node.comparators]
            steps = [self._compare(a, op, b) for a, op, b in zip(operands, node.ops, operands[1:], strict=False)]
            joined = steps[0]
            for step in steps[1:]:
                joined = joined & step
            return joined
        column = self.value(node)
        if isinstance(column, pd.Series) and column.dropna().map(lambda value: isinstance(value, bool)).all():
            return column.map(lambda value: value is True).astype(bool)
        raise ValueError("it is not a comparison")

    def _compare(self, left: ast.expr, compared: ast.cmpop, right: ast.expr) -> pd.Series:
        first, second = self.value(left), self.value(right)
        if isinstance(compared, ast.In | ast.NotIn):
            if not isinstance(first, pd.Series) or not isinstance(second, list):
                raise ValueError("'in' takes a column and a list, as in dataset in ['cifar10', 'cifar100']")
            inside = first.isin(second)
            return ~inside if isinstance(compared, ast.NotIn) else inside
        if type(compared) not in COMPARISONS:
            raise ValueError("'is' compares nothing here; use ==")
        if isinstance(first, list) or isinstance(second, list):
            raise ValueError("a list is valid after 'in' only")
        found = COMPARISONS[type(compared)](first, second)
        return found.astype(bool) if isinstance(found, pd.Series) else pd.Series(bool(found), index=self.table.index)

    def _dotted(self, node: ast.expr) -> str:
        """A column's name as it was written: ``dataset``, ``mix.grid``, or anything between backticks."""
        if isinstance(node, ast.Attribute):
            return f"{self._dotted(node.value)}.{node.attr}"
        if not isinstance(node, ast.Name):
            raise ValueError("a name was expected before the dot")
        place = re.fullmatch(r"quoted_column_([0-9]+)", node.id)
        return self.quoted[int(place[1])] if place and int(place[1]) < len(self.quoted) else node.id

    def _column(self, name: str) -> pd.Series:
        # Names of earlier versions are still understood, and so is ``pretrain.mix.grid`` for ``mix.grid``.
        for known in (name, OLD_KEYS.get(name), name.removeprefix("pretrain.") if "mix." in name else None):
            if known in self.table.columns:
                found: pd.Series = self.table[known]
                return found
        raise UnknownColumn(name)

    def value(self, node: ast.expr) -> Any:
        """A column, a constant or a list of constants."""
        if isinstance(node, ast.Name | ast.Attribute):
            return self._column(self._dotted(node))
        if isinstance(node, ast.Constant) and isinstance(node.value, str | int | float | bool | None):
            return node.value
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            number = self.value(node.operand)
            if isinstance(number, int | float):
                return -number
        if isinstance(node, ast.List | ast.Tuple | ast.Set):
            values = [self.value(part) for part in node.elts]
            if not any(isinstance(value, pd.Series | list) for value in values):
                return values
        raise ValueError(f"comparisons only; there is {SAID.get(type(node), 'something else')} in it")
