"""Run the same arms on another checkout of this package, in a process beside this one.

The other process takes everything but the bench from the other checkout, so a checkout from before
there was a bench can be measured too. Only one of the two works at any time.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from llava.bench.measure import Bench, Times
from llava.bench.schema import THIS
from llava.eval.engine import provenance
from llava.utils import UserInputError

OWN = Path(__file__).resolve().parents[2]
# `llava` is the other checkout's, `llava.bench` this one's.
BOOTSTRAP = """
import importlib.util, sys
other, own = sys.argv[1:]
sys.path.insert(0, other)
import llava
place = own + "/llava/bench"
spec = importlib.util.spec_from_file_location(
    "llava.bench", place + "/__init__.py", submodule_search_locations=[place]
)
sys.modules["llava.bench"] = llava.bench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(llava.bench)
from llava.bench.beside import serve
serve()
"""


class Beside:
    """A checkout that runs arms in a process of its own; a context that ends the process.

    Args:
        root: the checkout.
        plan: see `Plan`, as a dictionary.

    Raises:
        UserInputError: there is no checkout, or it cannot run the plan.
    """

    def __init__(self, root: Path, plan: dict[str, Any]) -> None:
        if not (root / "llava" / "__init__.py").is_file():
            raise UserInputError(f"--compare-with {root}: no checkout of this package is there")
        self.name = root.resolve().name
        if self.name == THIS:
            raise UserInputError(
                f"--compare-with {root}: the name {THIS!r} stands for this source tree; rename "
                "that folder"
            )
        self.commit = provenance.git_state(root / "llava")
        self._process = subprocess.Popen(
            [sys.executable, "-c", BOOTSTRAP, str(root.resolve()), str(OWN)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._ask("open", plan)

    def __enter__(self) -> "Beside":
        return self

    def __exit__(self, *_: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def begin_repeat(self) -> None:
        """As `Bench.begin_repeat`."""
        self._ask("begin_repeat")

    def describe(self, number: int, size: int) -> dict[str, Any]:
        """As `Bench.describe`."""
        return self._ask("describe", number, size)

    def measure(self, number: int, size: int) -> Times:
        """As `Bench.measure`."""
        return self._ask("measure", number, size)

    def _ask(self, name: str, *arguments: Any) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps([name, *arguments]) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise UserInputError(
                f"the checkout {self.name} stopped while it ran {name!r}; what it says is above"
            )
        answer = json.loads(line)
        if "error" in answer:
            raise UserInputError(f"the checkout {self.name}: {answer['error']}")
        return answer["value"]


def serve() -> None:
    """Answer the questions of `Beside` until its end closes."""
    # Whatever libraries print must not come between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    bench: Bench | None = None
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        try:
            if name == "open":
                bench, value = open_bench(*arguments), None
            else:
                value = getattr(bench, name)(*arguments)
            answer = {"value": value}
        except UserInputError as error:
            answer = {"error": str(error)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def open_bench(plan: dict[str, Any]) -> Bench:
    """Make the bench of a plan, see `Plan`."""
    from llava.bench.arms import BenchArm
    from llava.bench.run import Plan, open_subject

    subject = open_subject(Plan(**plan))
    arms = [BenchArm.from_dict(arm) for arm in plan["arms"]]
    return Bench(subject, arms, list(plan["batches"]))
