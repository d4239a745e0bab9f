"""Places of a formula that a sweep fills, such as ``kd(temperature={t})``, and the formula without them."""

import ast
import re

from vitkd_cli.errors import UserError
from vitkd_cli.objective import EXAMPLE, options_for
from vitkd_cli.options import literal

PLACE = re.compile(r"\{\s*([A-Za-z_]\w*)\s*\}")


class _Emptied(ast.NodeTransformer):
    """Leave out options and factors that are a ``{name}``, and note what they then are."""

    def __init__(self) -> None:
        self.defaults: dict[str, str | None] = {}

    def _note(self, name: str, default: str) -> None:
        """A place that stands for two defaults has none that could be told."""
        self.defaults[name] = default if self.defaults.get(name, default) == default else None

    def visit_Call(self, node: ast.Call) -> ast.AST:
        kept = []
        for keyword in node.keywords:
            if (name := _named(keyword.value)) and isinstance(node.func, ast.Name):
                known = options_for(node.func.id)
                if (option := keyword.arg or "") in known:
                    default = known[option].default
                    self._note(name, default if isinstance(default, str) else literal(default))
                    continue
            kept.append(keyword)
        emptied, node.keywords = node.keywords and not kept and not node.args, kept
        return node.func if emptied else self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        if isinstance(node.op, ast.Mult):
            for factor, rest in ((node.left, node.right), (node.right, node.left)):
                if name := _named(factor):
                    self._note(name, "1")
                    return self.visit(rest)
        return self.generic_visit(node)


def _named(node: ast.expr) -> str:
    """The name in ``{name}``, which Python reads as a set, or in ``"{name}"``."""
    if isinstance(node, ast.Set) and len(node.elts) == 1 and isinstance(node.elts[0], ast.Name):
        return node.elts[0].id
    if (
        isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and (found := PLACE.fullmatch(node.value))
    ):
        return found[1]
    return ""


def _emptied(loss: str) -> tuple[str, dict[str, str | None]]:
    if not PLACE.search(loss):
        return loss, {}
    emptied = _Emptied()
    try:
        tree = emptied.visit(ast.parse(" ".join(loss.split()), mode="eval"))
    except SyntaxError as problem:
        raise UserError(f'the objective "{loss}" cannot be read: {problem.msg}', EXAMPLE) from None
    return ast.unparse(tree), emptied.defaults


def default_formula(loss: str) -> str:
    """The formula of the default: an option that is varied has its own default, a factor is 1."""
    plain, _ = _emptied(loss)
    if left := PLACE.findall(plain):
        raise UserError(
            f"the formula has no default without {{{left[0]}}}",
            "an option (alpha={a}) or a factor ({w}*kd) may be varied; or vary whole formulas: --vary loss=…",
        )
    return plain


def default_of(loss: str, name: str) -> str | None:
    """What stands for a place in the default, as a formula writes it; None where nothing does."""
    return _emptied(loss)[1].get(name)
