"""A whole session at a real (pseudo) terminal, with the model that ships with the repository."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pexpect

ROOT = Path(__file__).resolve().parents[2]
STATUS = r"576 -> {} tokens \(\d+\.\d %\) \| encode \d+ ms \| score \d+\.\d \| select \d+\.\d"
PATIENCE = 400  # seconds: the machine may be busy


def test_a_session_with_llava_tiny(tmp_path: Path) -> None:
    tiny = ROOT / "playground" / "llava-tiny"
    overlay = tmp_path / "kept.png"
    flags = ["--model-path", str(tiny), "--image-file", str(tiny / "example.png")]
    flags += ["--temperature", "0", "--max-new-tokens", "8"]
    flags += ["--pruner", "zoo", "--keep-tokens", "64", "--pruner-option", "directions=8"]
    chat = pexpect.spawn(
        sys.executable,
        ["-m", "llava.serve.cli", *flags],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TERM": "dumb"},
        encoding="utf-8",
        timeout=PATIENCE,
        dimensions=(40, 100),
        # What a shell starts in the background ignores Ctrl-C, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        chat.expect("USER: ")
        chat.sendline("How many shapes are there?")
        chat.expect(r"ASSISTANT: [^\r]*\r\n")
        chat.expect(STATUS.format(64))
        chat.expect("USER: ")
        chat.sendline("/compare")
        chat.expect(r"zoo, 64 tokens, directions=8 +unpruned")
        chat.expect(r"tokens +64 +576\r\n")
        chat.expect("USER: ")
        chat.sendline(f"/overlay {overlay}")
        chat.expect(r"\[saved ")
        chat.expect("USER: ")
        chat.sendline("/mehtod grid")
        chat.expect("error: unknown command '/mehtod'; did you mean '/method'")

        # Ctrl-C: so many directions take far longer than it needs to be typed.
        chat.expect("USER: ")
        chat.sendline("/method zoo directions=20000")
        chat.expect(r"\[zoo, 64 tokens, directions=20000\]")
        chat.expect("USER: ")
        chat.sendline("Which colour is the circle?")
        chat.expect("ASSISTANT: ")
        chat.sendintr()
        chat.expect(r"stopped\]?\r\n")
        chat.expect("USER: ")
        chat.sendline("/method grid")
        chat.expect(r"\[grid, 64 tokens\]")
        chat.expect("USER: ")
        chat.sendline("Which colour is the circle?")
        chat.expect(STATUS.format(64))

        chat.expect("USER: ")
        chat.sendeof()
        chat.expect(pexpect.EOF)
        chat.close()
        assert chat.exitstatus == 0, chat.before
        assert overlay.stat().st_size > 0
    finally:
        chat.close(force=True)
