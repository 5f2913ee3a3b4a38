"""Everything is declared in pyproject.toml; this copies llava-tiny into wheels.

The model stays in playground/, where a checkout, its documents and its tests expect it.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SHIPPED = ("llava-tiny", "results/llava-tiny.json")  # what llava/shipped.py looks for


class BuildWithModel(build_py):
    """Build the package, then put `SHIPPED` into it; an editable install reads the checkout."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        source, target = Path("playground"), Path(self.build_lib, "llava", "playground")
        for name in SHIPPED:
            for file in sorted((source / name, *(source / name).rglob("*"))):
                if file.is_file():
                    copy = target / file.relative_to(source)
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(file, copy)


setup(cmdclass={"build_py": BuildWithModel})
