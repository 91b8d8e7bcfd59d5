"""llama.cpp's converter from checkpoints to GGUF, taken out of the source archive of llama-cpp-python.

    python examples/real/converter.py --out models/tools/llama.cpp

pip compares the archive's SHA-256 with the one below. What is there already is left as it is.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

PACKAGE = "llama-cpp-python==0.3.36"
SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
WANTED = ("convert_hf_to_gguf.py", "conversion/", "gguf-py/gguf/", "LICENSE")


def main() -> None:
    """Fetch it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    target: Path = parser.parse_args().out
    if target.is_dir():
        print(f"{target}: there already")
        return
    # A stopped job is sent SIGTERM, which would leave the archive in a hidden directory.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("error: stopped; nothing was written"))
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".converter-", dir=target.parent) as scratch:
        place = Path(scratch)
        pinned = place / "requirements.txt"
        pinned.write_text(f"{PACKAGE} --hash=sha256:{SHA256}\n")
        options = ["--no-deps", "--no-binary", ":all:", "--require-hashes", "--quiet", "--disable-pip-version-check"]
        command = [sys.executable, "-m", "pip", "download", *options, "--requirement", str(pinned), "--dest", scratch]
        if subprocess.run(command, check=False).returncode:
            sys.exit(f"error: pip could not download the source archive of {PACKAGE}")
        with tarfile.open(next(place.glob("llama_cpp_python-*.tar.gz"))) as archive:
            members = [
                member
                for member in archive.getmembers()
                if member.name.partition("/vendor/llama.cpp/")[2].startswith(WANTED)
            ]
            archive.extractall(place / "archive", members=members, filter="data")
        next((place / "archive").glob("*/vendor/llama.cpp")).rename(target)
    print(f"{target}: fetched")


if __name__ == "__main__":
    main()
