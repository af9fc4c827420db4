"""How many changes of the code do the tests notice?

    pip install mutmut                         # makes the changes
    python tests/mutants.py 150 1              # how many, and the seed of their draw

Changes are drawn evenly over the functions of all but tools/, bench/, experiments/ and examples/.
Those of texts and messages are left out. Each is written into a copy of the project, where tests
run until one fails: those of the changed file, then all quick ones, then the slow ones.
"""

import ast
import difflib
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from contextlib import suppress
from itertools import chain
from pathlib import Path

from libcst import FunctionDef
from mutmut.configuration import config  # [tool.mutmut] of pyproject.toml
from mutmut.mutation.file_mutation import create_mutations

SAID = {"write", "print", "flag", "refuse", "exit", "explained", "ValueError", "Stop"}
STAGES = ["-n", "auto", "-m", "not slow"], ["-n", "auto", "-m", "slow"]
LEFT_OUT = ".git", ".venv", "results", "runs", "__pycache__"


class Silent(ast.NodeTransformer):
    """Takes out what is only said."""

    def visit_Constant(self, node):
        return ast.Constant("") if isinstance(node.value, str) else node

    def visit_JoinedStr(self, node):
        return ast.Constant("")

    def visit_Raise(self, node):
        return ast.Raise()

    def visit_Call(self, node):
        name = getattr(node.func, "attr", None) or getattr(node.func, "id", None)
        return ast.Constant(0) if name in SAID else self.generic_visit(node)


def silent(text):
    return ast.dump(Silent().visit(ast.parse(text)))


def draw(count, seed):
    """Yields (file, its changed text): a change of each function, then a second one, and so on."""
    rng, by_function = random.Random(seed), defaultdict(list)
    sources = [[p] if p.is_file() else sorted(p.glob("*.py")) for p in config().source_paths]
    for path in chain(*sources):
        module, changes, *_ = create_mutations(str(path), path.read_text())
        for change in changes:
            if isinstance(function := change.contained_by_top_level_function, FunctionDef):
                by_function[function].append((path, module, change))
    queues = list(by_function.values())
    for queue in [queues, *queues]:
        rng.shuffle(queue)
    while count and any(queues):
        for queue in queues:
            while count and queue:
                path, module, change = queue.pop()
                text = module.deep_replace(change.original_node, change.mutated_node).code
                if silent(text) != silent(path.read_text()):
                    count -= 1
                    yield path, text
                    break


def noticed(copy, path, text):
    """Whether a test fails where the copy's file has this text."""
    own = f"tests/test_{path.stem}.py"
    stages = [[own, "-m", "not slow"]] * (copy / own).exists() + [*STAGES]
    (copy / path).write_text(text)
    for stage in stages:
        code = 1
        command = [sys.executable, "-m", "pytest", "-xq", "-p", "no:cacheprovider", *stage]
        with suppress(subprocess.TimeoutExpired):  # which is noticed too
            code = subprocess.run(command, cwd=copy, capture_output=True, timeout=1800).returncode
        if code:
            break
    shutil.copy(path, copy / path)
    return code != 0


def main():
    count, seed = map(int, sys.argv[1:])
    alive, every = Counter(), Counter()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "copy")
        shutil.copytree(".", copy, ignore=shutil.ignore_patterns(*LEFT_OUT))
        if noticed(copy, Path("eprli.py"), Path("eprli.py").read_text()):
            sys.exit("a test fails on the code as it is")
        for path, text in draw(count, seed):
            every[path] += 1
            if not noticed(copy, path, text):
                alive[path] += 1
                lines = path.read_text().splitlines(), text.splitlines()
                print(*difflib.unified_diff(*lines, str(path), n=0, lineterm=""), sep="\n")
    for path, count in every.items():
        print(f"{path}: {count - alive[path]} of {count} noticed")
    print(f"all: {every.total() - alive.total()} of {every.total()} noticed")


if __name__ == "__main__":
    main()
