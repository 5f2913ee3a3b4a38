"""A small playground in the published formats, made of scenes of `llava.world`.

It lets every benchmark run end to end where no real data is: same file names, same keys, same
prompts, other pictures. What comes out says that the code works, and nothing about any benchmark.
"""

from llava.eval.demo.playground import write_playground

__all__ = ["write_playground"]
