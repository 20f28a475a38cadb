"""Does a test notice when the mask's code is wrong? Breaks it in small ways, one at a time, and runs the room's tests on each.

    make mutants ARGS="--sample 100 --seed 3"
    make mutants ARGS="--module assistant_spans"

A mutant that no test notices survives: its place and what was changed are printed at the end. The tests run on a copy in a
temporary folder; nothing is changed here.
"""

from __future__ import annotations

import argparse
import ast
import copy
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

ROOT = Path(__file__).parents[1]
ROOM = [
    *sorted(p.relative_to(ROOT) for p in (ROOT / "mlx_sft/data/mask").glob("*.py") if p.name != "__init__.py"),
    Path("mlx_sft/data/encode.py"),
    Path("mlx_sft/data/encode.py"),
]
TESTS = ["tests/data/mask", "tests/data/test_encode.py", "tests/data/test_alignment.py", "tests/data/test_example.py"]
TESTS += [str(path.relative_to(ROOT)) for path in ROOT.glob("tests/data/test_*template.py")]
OPTIONS = ["-x", "-q", "-p", "no:cacheprovider", "--assert=plain"]
# Without tests/conftest.py, which imports the whole package, and so without what lies beside the project.
OPTIONS += ["--confcutdir=tests/data", "-k", "not real_qwen3"]
COPIED = ("mlx_sft", "tests", "pyproject.toml")
IMPORTED_ONCE = (PreTrainedTokenizerFast, render_jinja_template)
"""For all runs of the tests: that takes longer than the tests."""
SECONDS = 60
"""A mutant that makes the tests run for longer counts as noticed."""

COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.BitOr: ast.BitAnd,
    ast.BitAnd: ast.BitOr,
}
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any"}


@dataclass(frozen=True)
class Mutant:
    """A module's source with one change."""

    module: Path
    line: int
    change: str
    source: str

    def __str__(self) -> str:
        return f"{self.module}:{self.line}  {self.change}"


def changes(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """Copies of a node that are wrong, each with what was changed."""
    if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARISONS:
        new = copy.deepcopy(node)
        new.ops[0] = COMPARISONS[type(node.ops[0])]()
        yield f"{ast.unparse(node)}  →  {ast.unparse(new)}", new
    elif isinstance(node, ast.BoolOp):
        yield "and ↔ or", ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values)
        for index in range(len(node.values)):
            rest = [value for place, value in enumerate(node.values) if place != index]
            new_value = rest[0] if len(rest) == 1 else ast.BoolOp(node.op, rest)
            yield f"without `{ast.unparse(node.values[index])}`", new_value
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield f"{ast.unparse(node)}  →  {ast.unparse(node.operand)}", node.operand
    elif isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        new_operation = ast.BinOp(node.left, OPERATORS[type(node.op)](), node.right)
        yield f"{ast.unparse(node)}  →  {ast.unparse(new_operation)}", new_operation
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield f"{node.value}  →  {not node.value}", ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int):
        for other in (node.value + 1, node.value - 1):
            yield f"{node.value}  →  {other}", ast.Constant(other)
    elif isinstance(node, ast.IfExp):
        yield f"always `{ast.unparse(node.body)}`", node.body
        yield f"always `{ast.unparse(node.orelse)}`", node.orelse
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in NAMES:
        other_call = ast.Call(ast.Name(NAMES[node.func.id], ast.Load()), node.args, node.keywords)
        yield f"{node.func.id}  →  {NAMES[node.func.id]}", other_call
    elif isinstance(node, ast.Return) and node.value is not None and ast.unparse(node.value) != "None":
        yield f"{ast.unparse(node)}  →  return None", ast.Return(ast.Constant(None))
    elif isinstance(node, ast.If | ast.While):
        never = copy.deepcopy(node)
        never.test = ast.Constant(False)
        yield f"never `if {ast.unparse(node.test)}`", never
    elif isinstance(node, ast.Break | ast.Continue | ast.Raise | ast.AugAssign) or _does_something(node):
        yield f"without `{ast.unparse(node)}`", ast.Pass()


def _does_something(node: ast.AST) -> bool:
    """Whether it calls, or sets an attribute or item. Without the first value of a name nothing would run at all."""
    if isinstance(node, ast.Expr):
        return not isinstance(node.value, ast.Constant)
    return isinstance(node, ast.Assign) and not isinstance(node.targets[0], ast.Name)


class Replace(ast.NodeTransformer):
    """Puts a node in place of another."""

    def __init__(self, old: ast.AST, new: ast.AST) -> None:
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> ast.AST:
        if node is self.old:
            return ast.copy_location(self.new, node)
        return super().visit(node)


def inside_functions(tree: ast.Module) -> Iterator[ast.AST]:
    """Every node of the functions' bodies, without annotations and docstrings; each once."""
    seen: set[int] = set()
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef):
            continue
        for statement in function.body:
            for node in ast.walk(statement):
                if id(node) not in seen:
                    seen.add(id(node))
                    yield node


def mutants(module: Path) -> Iterator[Mutant]:
    """All mutants of a module."""
    source = (ROOT / module).read_text(encoding="utf-8")
    tree = ast.parse(source)
    for node in list(inside_functions(tree)):
        for change, new in changes(node):
            mutated = ast.fix_missing_locations(_with(tree, node, new))
            yield Mutant(module, getattr(node, "lineno", 0), " ".join(change.split())[:120], ast.unparse(mutated))


def _with(tree: ast.Module, old: ast.AST, new: ast.AST) -> ast.Module:
    """A copy of the tree with one node replaced."""
    place = next(index for index, node in enumerate(ast.walk(tree)) if node is old)
    copied = copy.deepcopy(tree)
    same = next(node for index, node in enumerate(ast.walk(copied)) if index == place)
    return ast.Module(Replace(same, copy.deepcopy(new)).visit(copied).body, [])


def run_tests(folder: Path, show: bool = False) -> bool:
    """Whether the room's tests pass there. They run in a fork, which has imported already what does not change."""
    child = os.fork()
    if child == 0:
        os.chdir(folder)
        if not show:
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, 1)
            os.dup2(nothing, 2)
        sys.path.insert(0, str(folder))
        os._exit(int(pytest.main([*OPTIONS, *TESTS])))
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status) == 0
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def chosen(arguments: argparse.Namespace) -> list[Mutant]:
    """The mutants to be tried."""
    modules = [module for module in ROOM if arguments.module in (None, module.stem)]
    if not modules:
        sys.exit(f"no module {arguments.module}; there are {', '.join(module.stem for module in ROOM)}")
    found = [mutant for module in modules for mutant in mutants(module)]
    if arguments.sample and arguments.sample < len(found):
        found = random.Random(arguments.seed).sample(found, arguments.sample)
    return found


def main() -> None:
    """Try mutants, and print those that survive."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, metavar="N", help="try N of them, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--module", help="only of one module: assistant_spans, headers, ...")
    parser.add_argument("--list", action="store_true", help="print the mutants, and try none")
    arguments = parser.parse_args()
    found = chosen(arguments)
    if arguments.list:
        print("\n".join(map(str, found)))
        return
    survivors = []
    with tempfile.TemporaryDirectory(prefix="mutants-") as temporary:
        folder = Path(temporary)
        for name in COPIED:
            copy_of = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy_of(ROOT / name, folder / name)
        if not run_tests(folder, show=True):
            sys.exit("the tests fail before anything is changed")
        for number, mutant in enumerate(found, 1):
            (folder / mutant.module).write_text(mutant.source, encoding="utf-8")
            survives = run_tests(folder)
            shutil.copy(ROOT / mutant.module, folder / mutant.module)
            survivors += [mutant] if survives else []
            print(f"{number}/{len(found)}  {'SURVIVES' if survives else 'noticed '}  {mutant}", flush=True)
    print(f"\n{len(survivors)} of {len(found)} mutants survive; some of them change nothing", *survivors, sep="\n")


if __name__ == "__main__":
    main()
