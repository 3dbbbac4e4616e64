"""
Releases of Mem0 that came before, each in an environment of its own, and programs that are run in one.

The environments are made once for a machine, from the package index; nothing of them is imported here.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from memharbor.embedder import ANY_KEY

OLD_RELEASES = ("0.1.118", "1.0.11")
# Mem0's pgvector store needs the first; its one graph store that runs without a server the others.
_BESIDE = ("psycopg[binary,pool]==3.3.9", "kuzu==0.11.3", "rank-bm25==0.2.2")


def environment(release: str) -> Path:
    """Find the Python that has an old release of Mem0, or make it; the package index is asked for what is missing."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    digest = hashlib.sha256(repr((_BESIDE, sys.version_info[:2])).encode()).hexdigest()[:8]
    folder = cache / "memharbor" / "mem0-environments" / f"{release}-{digest}"
    if not (folder / "complete").exists():
        shutil.rmtree(folder, ignore_errors=True)
        uv = Path(sys.executable).parent / "uv"
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        python = folder / "bin" / "python"
        for command in (
            [uv, "venv", "--quiet", "--python", version, folder],
            [uv, "pip", "install", "--quiet", "--python", python, f"mem0ai=={release}", *_BESIDE],
        ):
            done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, timeout=900)
            assert done.returncode == 0, f"mem0ai {release} cannot be installed: {done.stderr}"
        (folder / "complete").touch()
    return folder / "bin" / "python"


def run_program(python: Path | str, program: str, folder: Path, base_url: str, **environ: str) -> str:
    """
    Run a program to its end, and return what it printed; the test fails where it fails.

    Args:
        python: That has the release.
        program: Its text.
        folder: Where it runs, and where Mem0 keeps what it keeps.
        base_url: Of the stand-in for OpenAI.
        environ: More variables; none of Python's, OpenAI's, Mem0's and ours are inherited.
    """
    folder.mkdir(exist_ok=True)
    path = folder / "program.py"
    path.write_text(program)
    ours = ("PYTHON", "OPENAI_", "OPENROUTER_", "MEM0_", "MEMHARBOR_", "PG")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    done = subprocess.run(
        [str(python), str(path)],
        env={
            **inherited,
            "OPENAI_BASE_URL": base_url,
            "OPENAI_API_KEY": ANY_KEY,
            "MEM0_TELEMETRY": "False",
            "MEM0_DIR": str(folder / "mem0"),
            "NO_PROXY": "127.0.0.1",
            **environ,
        },
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout
