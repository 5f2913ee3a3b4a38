"""Options and fixtures shared by all tests."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

_ERROR = "largest error"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run tests that take minutes")
    parser.addoption("--gpu", action="store_true", help="also run tests that need a CUDA GPU")
    parser.addoption("--triton", action="store_true", help="also run tests that need triton")
    parser.addoption("--deepspeed", action="store_true", help="also run tests of DeepSpeed")
    parser.addoption("--real", action="store_true", help="also run tests that need real parts")
    parser.addoption(
        "--at-least", type=int, default=0, metavar="N", help="fail if fewer tests than N passed"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    reasons = {
        "slow": "takes minutes; run with --slow",
        "gpu": "needs a CUDA GPU; run with --gpu (bash scripts/gpu.sh)",
        "triton": "needs triton; run with --triton (bash scripts/test.sh --triton)",
        "deepspeed": "needs DeepSpeed; run with --deepspeed (bash scripts/test.sh --deepspeed)",
        "real": "needs real parts; run with --real (bash scripts/test.sh --real)",
    }
    for item in items:
        for group, reason in reasons.items():
            # A marker, not a keyword: keywords hold the names of folders too.
            if item.get_closest_marker(group) and not config.getoption(f"--{group}"):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def goldens() -> Path:
    """Folder of recorded inputs and outputs of reference programs."""
    return Path(__file__).parent / "goldens"


@pytest.fixture(scope="session")
def hf_llava_tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of llava-tiny in Hugging Face's form; it is shared, so no test may write to it."""
    from llava.model.convert import convert  # here, because it needs torch

    return convert("llava-tiny", tmp_path_factory.mktemp("converted") / "llava-tiny-hf")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """`hub(folder, name)`: the folder's files in a cache of the hub, which is out of reach.

    The cache has the hub's own layout: contents are blobs, and snapshots link to them.
    """
    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def publish(folder: Path, name: str, revision: str = "main", commit: str = "a" * 40) -> str:
        home = cache / f"models--{name.replace('/', '--')}"
        files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
        (home / "blobs").mkdir(parents=True, exist_ok=True)
        (home / "refs").mkdir(exist_ok=True)
        (home / "refs" / revision).write_text(commit)
        for number, file in enumerate(files):
            blob = home / "blobs" / f"{commit[:4]}{number}"
            shutil.copyfile(file, blob)
            link = home / "snapshots" / commit / file.relative_to(folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(blob)
        return name

    return publish


@pytest.fixture
def record_error(request: pytest.FixtureRequest) -> Callable[[str, float], None]:
    """``record_error(group, value)``: note a deviation from a golden.

    The largest value of each group is printed at the end of the run, also under xdist.
    """

    def record(group: str, value: float) -> None:
        request.node.user_properties.append((_ERROR, (group, float(value))))

    return record


def _recorded(terminalreporter: pytest.TerminalReporter) -> Iterator[tuple[str, float]]:
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            for name, value in report.user_properties:
                if name == _ERROR:
                    yield value[0], value[1]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    largest: dict[str, float] = {}
    for group, value in _recorded(terminalreporter):
        largest[group] = max(value, largest.get(group, value))
    if largest:
        terminalreporter.section("largest error per golden group")
        for group, value in sorted(largest.items()):
            terminalreporter.write_line(f"{group:<44} {value:.3g}")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Fail a run that lost tests: a file that is no longer collected makes no noise by itself."""
    wanted = session.config.getoption("--at-least")
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if not wanted or reporter is None or hasattr(session.config, "workerinput"):
        return
    passed = len(reporter.stats.get("passed", []))
    if exitstatus == 0 and passed < wanted:
        reporter.write_line(f"only {passed} tests passed; tests/recorded_counts says {wanted}")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
