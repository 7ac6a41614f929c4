"""Limits of the package's structure: code lines, long functions, many parameters, and where stages are named."""

import ast
import io
import tokenize
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = {str(path.relative_to(ROOT)): path.read_text() for path in sorted((ROOT / "rlhf_jax").rglob("*.py"))}
TREES = {path: ast.parse(text) for path, text in SOURCES.items()}
FUNCTIONS = [
    (f"{path}:{node.name}", node)
    for path, tree in TREES.items()
    for node in ast.walk(tree)
    if isinstance(node, ast.FunctionDef)
]
LAYOUT = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
# Names with one meaning in several modules: every group of families lists its own, both programs have an entry point,
# and the judge of the built-in data shares nothing with the generator.
SAME_MEANING = {"FAMILIES", "main", "OPENINGS", "CLOSINGS", "T", "LOGGER"}


def docstring(node: ast.AST) -> ast.Expr | None:
    has_body = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and node.body
    return node.body[0] if has_body and ast.get_docstring(node, clean=False) is not None else None


def code_lines(text: str) -> set[int]:
    """Lines with code, without docstrings, comments, blank lines and imports."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    lines = {line for token in tokens if token.type not in LAYOUT for line in range(token.start[0], token.end[0] + 1)}
    for node in ast.walk(ast.parse(text)):
        for left_out in (docstring(node), node if isinstance(node, ast.Import | ast.ImportFrom) else None):
            lines -= set(range(left_out.lineno, left_out.end_lineno + 1)) if left_out else set()
    return lines


def parameters(function: ast.FunctionDef) -> int:
    """Number of parameters, `self` and `cls` left out."""
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    own = [argument for argument in named if argument.arg not in ("self", "cls")]
    return len(own) + bool(arguments.vararg) + bool(arguments.kwarg)


def stage_literals(tree: ast.Module) -> set[str]:
    """Names of stages among the string literals of a module, docstrings left out."""
    docstrings = {id(found.value) for node in ast.walk(tree) if (found := docstring(node))}
    literals = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in docstrings]
    return {node.value for node in literals} & {"sft", "reward", "ppo"}


def top_level_names(tree: ast.Module) -> set[str]:
    """Public names that a module defines, imports left out."""
    names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    assigned = [target for node in tree.body if isinstance(node, ast.Assign) for target in node.targets]
    assigned += [node.target for node in tree.body if isinstance(node, ast.AnnAssign)]
    names |= {target.id for target in assigned if isinstance(target, ast.Name)}
    return {name for name in names if not name.startswith("_")}


def test_code_lines_are_counted_without_docstrings_comments_blank_lines_and_imports():
    text = (
        '"""Doc."""\nimport os\n\n# why\ndef f(\n    x,  # in m\n):\n    """Doc\n    of f."""\n    return """a\nb"""\n'
    )
    assert code_lines(text) == {5, 6, 7, 10, 11}


def test_the_package_has_at_most_15832_code_lines():
    assert sum(len(code_lines(text)) for text in SOURCES.values()) <= 15832


def test_no_function_has_more_than_80_lines_or_8_parameters():
    too_long = [name for name, node in FUNCTIONS if node.end_lineno - node.lineno + 1 > 80]
    assert too_long == [] and [name for name, node in FUNCTIONS if parameters(node) > 8] == []


def test_stages_are_named_in_at_most_six_files_and_listed_in_one():
    assert len([path for path, tree in TREES.items() if stage_literals(tree)]) <= 6
    assert [path for path, tree in TREES.items() if "STAGES" in top_level_names(tree)] == ["rlhf_jax/stages/table.py"]


def test_a_public_name_is_defined_in_one_module():
    defined = Counter(name for tree in TREES.values() for name in top_level_names(tree))
    assert {name for name, count in defined.items() if count > 1} <= SAME_MEANING
